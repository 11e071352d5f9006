"""How often to save: what checkpoints cost against what a failure costs without them."""

import math


def young_interval(save: float, failure: float) -> float:
    """Seconds between checkpoints that lose least where one costs `save` seconds and the mean time between
    failures is `failure` seconds: sqrt(2 * save * failure).

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974. Where a
    save is much shorter than that, J. T. Daly's higher order (FGCS 22(3), 2006) is the same to a few per
    cent. What is lost per second is save / interval + interval / (2 * failure), which is least there.
    """
    return math.sqrt(2.0 * save * failure)
