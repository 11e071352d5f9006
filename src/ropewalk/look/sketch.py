"""Summaries of any number of values in bounded memory, each with its error, and which can be added up.

Both are the same for the same values, however they are divided, as long as they are exact; otherwise within
the bounds that they say.
"""

from collections.abc import Callable, Mapping
from math import ceil, floor, log
from typing import Any

import numpy as np

EXACT = 512
"""Different values of which each is counted."""
GAMMA = 1.02
SMALLEST = 1e-9
_LOG = log(GAMMA)


class Quantiles:
    """Counts of numbers: exact up to EXACT different ones, else in bins GAMMA times as wide as the last, so
    that a quantile is off by at most 1% (DDSketch, Masson, Rim, Lee 2019). Absolute values below SMALLEST
    are 0. Count, sum, smallest and largest are always exact; `unknown` counts null and NaN.
    """

    def __init__(self) -> None:
        self.count = self.unknown = 0
        self.sum, self.min, self.max = 0.0, float("inf"), float("-inf")
        self.whole = True
        """whether all are whole numbers, so that quantiles are"""
        self.values: dict[float, int] | None = {}
        self.bins: dict[tuple[int, int], int] = {}
        """(sign, power of GAMMA) -> how many; used when there are too many values"""

    def add(self, values: np.ndarray) -> None:
        """[n] of any numeric type."""
        values = np.asarray(values, dtype=np.float64)
        known, counts = np.unique(values[np.isfinite(values)], return_counts=True)
        count = int(counts.sum())
        self.unknown += len(values) - count
        if count:
            whole = bool((known == np.round(known)).all())
            self._reckon(count, float(known @ counts), float(known[0]), float(known[-1]), whole)
            self._put(known, counts)

    def _reckon(self, count: int, total: float, low: float, high: float, whole: bool) -> None:
        self.count += count
        self.sum += total
        self.min, self.max = min(self.min, low), max(self.max, high)
        self.whole = self.whole and whole

    def _put(self, values: np.ndarray, counts: np.ndarray) -> None:
        if self.values is None:
            self._bin(values, counts)
            return
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self.values[value] = self.values.get(value, 0) + count
        if len(self.values) > EXACT:
            self._widen()

    def _widen(self) -> None:
        """From values to bins."""
        if self.values is not None:
            exact, self.values = self.values, None
            self._bin(np.array([*exact]), np.array([*exact.values()], np.int64))

    def _bin(self, values: np.ndarray, counts: np.ndarray) -> None:
        size = np.abs(values)
        sign = np.where(size < SMALLEST, 0, np.sign(values)).astype(np.int64)
        power = np.ceil(np.log(np.maximum(size, SMALLEST)) / _LOG).astype(np.int64) * (sign != 0)
        for key, count in zip(zip(sign.tolist(), power.tolist(), strict=True), counts.tolist(), strict=True):
            self.bins[key] = self.bins.get(key, 0) + count

    def merge(self, other: "Quantiles") -> None:
        self._reckon(other.count, other.sum, other.min, other.max, other.whole)
        self.unknown += other.unknown
        if other.values is not None:
            self._put(np.array([*other.values]), np.array([*other.values.values()], np.int64))
            return
        self._widen()
        for key, n in other.bins.items():
            self.bins[key] = self.bins.get(key, 0) + n

    def _pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low, high, count) of the bins, ascending; of an exact value low is high."""
        if self.values is not None:
            ordered = sorted(self.values.items())
            values = np.array([v for v, _ in ordered])
            return values, values, np.array([n for _, n in ordered], np.int64)
        edges = []
        for (sign, power), n in self.bins.items():
            far, near = GAMMA**power * sign, GAMMA ** (power - 1) * sign
            edges.append((min(near, far), max(near, far), n))
        low, high, counts = (np.array(x) for x in zip(*sorted(edges), strict=True))
        return np.clip(low, self.min, self.max), np.clip(high, self.min, self.max), counts

    def quantile(self, share: float) -> float | None:
        """The smallest value such that at least this share of all are not above it; None for no values."""
        if not self.count:
            return None
        low, high, counts = self._pieces()
        i = int(np.searchsorted(np.cumsum(counts), max(ceil(share * self.count), 1)))
        middle = float((low[i] + high[i]) / 2)
        return round(middle) if self.whole else middle

    def histogram(self, edges: np.ndarray) -> list[int]:
        """How many lie from edges[i] on and below edges[i + 1]; the first and last have the rest too."""
        result = np.zeros(len(edges) - 1)
        if self.count:
            low, high, counts = self._pieces()
            inside = edges[1:-1]
            cumulated = np.zeros(len(inside))
            for a, b, n in zip(low, high, counts, strict=True):
                width = b - a
                part = (inside - a) / width if width > 0 else (inside > a).astype(float)
                cumulated += n * np.clip(part, 0, 1)
            result = np.diff(np.concatenate([[0], np.round(cumulated), [self.count]]))
        return [int(n) for n in result]

    def zeros(self) -> int:
        return self.bins.get((0, 0), 0) if self.values is None else self.values.get(0.0, 0)

    def without_zeros(self) -> "Quantiles":
        """The same but for zeros; its smallest and largest are those of the bins, where there were zeros."""
        found = Quantiles.load(self.dump())
        found.count -= self.zeros()
        if found.values is not None:
            found.values.pop(0.0, None)
        found.bins.pop((0, 0), None)
        if found.count and self.zeros():
            low, high, _ = found._pieces()
            found.min = float(low[0]) if self.min == 0 else self.min
            found.max = float(high[-1]) if self.max == 0 else self.max
        return found

    def summary(self) -> dict[str, float | int | None]:
        shares = {"p5": 0.05, "median": 0.5, "p95": 0.95}
        none = not self.count
        return {
            "count": self.count,
            "unknown": self.unknown,
            "mean": None if none else self.sum / self.count,
            "min": None if none else self.min,
            **{name: self.quantile(share) for name, share in shares.items()},
            "max": None if none else self.max,
        }

    def dump(self) -> dict[str, Any]:
        values = None if self.values is None else sorted(self.values.items())
        bins = [[*key, n] for key, n in sorted(self.bins.items())]
        ends = {} if self.count else {"min": None, "max": None}  # infinity is not JSON
        return {**vars(self), "values": values, "bins": bins, **ends}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "Quantiles":
        found = cls()
        vars(found).update(dumped)
        found.values = None if dumped["values"] is None else {v: n for v, n in dumped["values"]}
        found.bins = {(sign, power): n for sign, power, n in dumped["bins"]}
        if not found.count:
            found.min, found.max = float("inf"), float("-inf")
        return found


class Frequent:
    """The most frequent of any number of things, known by 64-bit hashes: `size` counters (Misra, Gries 1982;
    added up as Agarwal et al. 2012). A count is never too high, and too low by at most `error`, which is at
    most `total` / (size + 1); what is not here was there at most `error` times.
    """

    SHOWN = 256
    """Of so many an example is kept."""

    def __init__(self, size: int) -> None:
        self.size, self.total, self.error = size, 0, 0
        self.hashes, self.counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        """the largest count first, of equals the smaller hash"""
        self.examples: dict[int, str] = {}

    def add(self, hashes: np.ndarray, example: Callable[[int], str]) -> None:
        """hashes [n] uint64; example(i) shows the i-th of them."""
        if not len(hashes):
            return
        found, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        self._take(found, counts, len(hashes))
        for value in self.hashes[: self.SHOWN].tolist():
            if value not in self.examples:
                at = int(np.searchsorted(found, np.uint64(value)))
                # Only what was seen now can have risen so high, since all others lose alike.
                if at < len(found) and found[at] == value:
                    self.examples[value] = example(int(first[at]))
        self._forget()

    def merge(self, other: "Frequent") -> None:
        order = np.argsort(other.hashes)
        self.error += other.error
        self._take(other.hashes[order], other.counts[order], other.total)
        self.examples = {**other.examples, **self.examples}
        self._forget()

    def _take(self, found: np.ndarray, counts: np.ndarray, total: int) -> None:
        self.total += total
        hashes, inverse = np.unique(np.concatenate([self.hashes, found]), return_inverse=True)
        summed = np.bincount(inverse, np.concatenate([self.counts, counts]), len(hashes)).astype(np.int64)
        self._keep(hashes, summed)

    def _keep(self, hashes: np.ndarray, counts: np.ndarray) -> None:
        order = np.lexsort((hashes, -counts))
        if len(order) > self.size:
            least = int(counts[order[self.size]])
            self.error += least
            order = order[: self.size]
            order = order[counts[order] > least]
            counts = counts - least
        self.hashes, self.counts = hashes[order], counts[order]

    def _forget(self) -> None:
        shown = set(self.hashes[: self.SHOWN].tolist())
        self.examples = {value: text for value, text in self.examples.items() if value in shown}

    def shrunk(self, size: int) -> "Frequent":
        """With fewer counters."""
        result = Frequent(size)
        result.total, result.error, result.examples = self.total, self.error, dict(self.examples)
        result._keep(self.hashes, self.counts)
        result._forget()
        return result

    def top(self) -> list[tuple[str, int]]:
        """(example, count) of those that were there twice at least, the most frequent first."""
        pairs = zip(self.hashes[: self.SHOWN].tolist(), self.counts.tolist(), strict=False)
        return [
            (self.examples[value], n) for value, n in pairs if n + self.error > 1 and value in self.examples
        ]

    def dump(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "total": self.total,
            "error": self.error,
            "hashes": self.hashes.tolist(),
            "counts": self.counts.tolist(),
            "examples": [[value, text] for value, text in self.examples.items()],
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "Frequent":
        found = cls(dumped["size"])
        found.total, found.error = dumped["total"], dumped["error"]
        found.hashes = np.array(dumped["hashes"], np.uint64)
        found.counts = np.array(dumped["counts"], np.int64)
        found.examples = {value: text for value, text in dumped["examples"]}
        return found


def octaves(low: float, high: float) -> np.ndarray:
    """Powers of a root of 2 around low to high, both above 0: of one that gives some twelve bins or more."""
    per = next((n for n in (2, 4, 8) if n * log(high / low, 2) >= 12), 8)
    first, last = floor(per * log(low, 2)), floor(per * log(high, 2)) + 1
    return 2.0 ** (np.arange(first, last + 1) / per)
