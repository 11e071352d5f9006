"""Random orders without a generator: hashes of what an order depends on, and of the index.

Nothing is drawn one after the other, so that any part of any order is found at once, and no version of a
library can change it.
"""

import numpy as np

from ropewalk.clean.words import mix


def hashes(fingerprint: str, seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """[count] uint64, all different: splitmix64 (Steele, Lea, Flood 2014) of the index, begun from all the
    rest. `purpose` keeps the orders of one epoch apart. splitmix64 is a bijection, so that whoever sorts by
    these meets no ties, and needs no stable sort."""
    start = int(fingerprint[:16], 16)
    for part in (seed, epoch, purpose):
        start = int(_splitmix(np.array([(start ^ part) & (2**64 - 1)], dtype=np.uint64))[0])
    return _splitmix(np.uint64(start) ^ np.arange(count, dtype=np.uint64))


def _splitmix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return mix(x + np.uint64(0x9E3779B97F4A7C15))
