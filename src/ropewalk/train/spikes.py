"""Loss spikes: how far a step's loss is above the losses before it, and which batches a run leaves out.

The measure is the modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993),
0.6745 (x - median) / MAD, over the last steps that were kept: MAD is the median distance from the median, and
0.6745 makes the score that of standard deviations where the losses are normal. Unlike a mean and a standard
deviation, neither median moves with the few outliers that it is there to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

NORMAL = 0.6745
"""MAD of a normal distribution, in standard deviations."""
FLOOR = 0.01
"""Smallest MAD, as a share of the median: where losses hardly vary, 1% more is no spike yet."""


def robust_scores(values: Sequence[float], past: Sequence[float]) -> list[float]:
    """The modified z-score of each value among the finite numbers `past`; above 0 it exceeds their median."""
    middle = median(past)
    spread = max(median(abs(x - middle) for x in past), FLOOR * abs(middle), 1e-12)
    return [NORMAL * (value - middle) / spread for value in values]


@dataclass
class Spikes:
    """The losses that a step's is compared with, and what was done about spikes: part of every checkpoint.

    So a run that goes on decides as it would have, and sees the same data.
    """

    window: int
    losses: list[float] = field(default_factory=list)
    """of the last `window` steps that were not skipped"""
    skipped: list[int] = field(default_factory=list)
    """steps whose update was dropped"""
    left_out: list[list[int]] = field(default_factory=list)
    """for each rollback, the numbers of the batches that no step trains on from then on"""

    def score(self, loss: float) -> float | None:
        """The z-score of a step's finite loss; None until half of the window is filled."""
        if 2 * len(self.losses) < self.window:
            return None
        return robust_scores([loss], self.losses)[0]

    def keep(self, loss: float) -> None:
        """The loss of a step that was not skipped: later ones are compared with it."""
        self.losses = [*self.losses, loss][-self.window :]

    def batch(self, step: int) -> int:
        """Number (from 0, in the data's order) of the batch of a step (from 1), past those left out."""
        number = step - 1
        for gone in sorted(batch for window in self.left_out for batch in window):
            if gone <= number:
                number += 1
        return number

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "skipped": self.skipped, "left_out": self.left_out}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave; of a checkpoint that has none, the beginning."""
        self.losses = list(state.get("losses", []))[-self.window :]
        self.skipped = list(state.get("skipped", []))
        self.left_out = [list(window) for window in state.get("left_out", [])]
