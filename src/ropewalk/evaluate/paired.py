"""Is one of two variants better? Each is measured with the same seeds, and the pairs' differences are judged.

A seed decides the first weights and the order of the data, and both runs of a pair share it: what it brings
for good or bad goes out of their difference. What is left is judged by the paired t interval (Student 1908).
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
_NUMBERS = "zero one two three four five six seven eight nine ten".split()


@dataclass(frozen=True)
class Paired:
    """A measure of two variants, `before[i]` and `after[i]` with the same seed. The difference is
    after - before; `smaller_is_better` says what it means."""

    measure: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    smaller_is_better: bool = True

    def __post_init__(self) -> None:
        if len(self.before) != len(self.after) or len(self.before) < 2:
            raise ValueError("pairs of at least two seeds are needed")

    @property
    def differences(self) -> list[float]:
        return [b - a for a, b in zip(self.before, self.after, strict=True)]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return fmean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean difference."""
        return stdev(self.differences) / math.sqrt(len(self.before))

    @property
    def half_width(self) -> float:
        """Of the interval around the mean that holds the true difference with probability CONFIDENCE, if
        differences are normally distributed."""
        return t_quantile(CONFIDENCE, len(self.before) - 1) * self.error

    @property
    def p_value(self) -> float:
        """How often so large a mean, for better or worse, would come of variants that are equally good."""
        if self.error == 0.0:
            return 0.0 if self.mean else 1.0
        return 1.0 - t_within(abs(self.mean) / self.error, len(self.before) - 1)

    @property
    def differs(self) -> bool:
        return abs(self.mean) > self.half_width

    @property
    def better(self) -> bool | None:
        """Whether `after` is better; None where the seeds cannot show it."""
        return (self.mean < 0) == self.smaller_is_better if self.differs else None

    def numbers(self) -> str:
        """The mean difference and half its interval, as in `+0.120 +- 0.011`."""
        return f"{self.mean:+.4g} +- {self.half_width:.2g}"

    def as_dict(self) -> dict[str, object]:
        names = ("mean", "error", "half_width", "p_value", "differs", "better", "differences")
        return {**vars(self), **{name: getattr(self, name) for name in names}, "confidence": CONFIDENCE}


def number(n: int) -> str:
    """In words up to ten."""
    return _NUMBERS[n] if n < len(_NUMBERS) else str(n)


def t_within(t: float, degrees: int) -> float:
    """Probability that Student's t of so many degrees of freedom lies between -t and t (t >= 0): the finite
    sums for whole degrees, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """The t with `t_within(t, degrees) == probability`, found by halving."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < probability else (low, middle)
    return high
