"""Runs in arrays: what lies beside what is equal to it, and places in runs of given lengths."""

import numpy as np


def within(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0]-1, 0 .. counts[1]-1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def opens(*columns: np.ndarray) -> np.ndarray:
    """[n] bool: where a row of these columns, [n] each, is not as the one before it; true of the first."""
    found = np.ones(len(columns[0]), bool)
    found[1:] = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        found[1:] |= column[1:] != column[:-1]
    return found


def shared(opening: np.ndarray) -> np.ndarray:
    """[n] bool: what is in a run of two or more. Runs begin where `opening` [n] bool holds."""
    return ~(opening & np.append(opening[1:], True)[: len(opening)])
