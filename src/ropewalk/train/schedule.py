"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


def learning_rate(
    step: int,
    total: int,
    *,
    peak: float,
    name: ScheduleName = "cosine",
    warmup: int = 0,
    decay_fraction: float = 0.2,
    minimum: float = 0.1,
) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `total`.

    Warm-up is linear: step 1 uses peak / warmup and step `warmup` the peak. After it cosine (arXiv
    1608.03983) and linear fall so that the last step uses minimum * peak; constant stays; warmup_stable_decay
    stays and falls linearly over the last `decay_fraction` of the run (arXiv 2405.18392).
    """
    if step <= warmup:
        return peak * step / warmup
    if name == "constant":
        return peak
    start = warmup
    if name == "warmup_stable_decay":
        start = max(warmup, total - round(decay_fraction * total))
    fallen = max(0.0, (step - start) / max(1, total - start))
    if name == "cosine":
        fallen = (1.0 - math.cos(math.pi * fallen)) / 2.0
    return peak * (1.0 - (1.0 - minimum) * fallen)
