"""How a run is spread over processes: the degrees, and the one rule that they obey."""

import math
from dataclasses import dataclass
from typing import Literal

from ropewalk.errors import UserError

REST = -1
DEGREES = ("replicate", "shard", "context", "tensor")
"""in the order of the processes: those of one `tensor` group are neighbours"""


@dataclass(frozen=True)
class Layout:
    """Into how many parts each thing is divided; the product is the number of processes."""

    replicate: int = 1
    """groups of processes with a whole model each, which add up their gradients"""
    shard: int = REST
    """processes that share one model: each holds a part of every weight, gradient and optimizer state"""
    context: int = 1
    """processes that share the tokens of a row"""
    tensor: int = 1
    """processes that share every matrix product"""
    context_exchange: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """how attention reaches the tokens that other processes of a `context` group have"""
    stage: Literal[1, 2, 3] = 3
    """what is divided (ZeRO, arXiv 1910.02054): 1 optimizer states, 2 gradients too, 3 weights too"""

    @property
    def data(self) -> int:
        """Parts into which the rows of a batch are divided."""
        return self.replicate * self.shard

    @property
    def parts(self) -> int:
        """Parts into which weights and states are divided: processes that share rows share the model, too."""
        return self.shard * self.context

    @property
    def whole(self) -> int:
        """Rows have a multiple of so many tokens: a process of a `context` group has one piece of their
        beginning and one of their end, of which each of a `tensor` group takes some."""
        return (2 * self.context if self.context > 1 else 1) * self.tensor

    @property
    def processes(self) -> int:
        """How many it takes; a degree that is "the rest" counts as one."""
        return math.prod(max(1, getattr(self, name)) for name in DEGREES)

    def over(self, processes: int) -> "Layout":
        """The same with its -1 filled in. UserError where the degrees do not make `processes`."""
        open_ = [name for name in DEGREES if getattr(self, name) == REST]
        if len(open_) > 1:
            raise UserError(f"parallel: {' and '.join(open_)} are both -1 (the rest); give one of them")
        rest, odd = divmod(processes, self.processes)
        said = " x ".join(f"{name} {getattr(self, name)}" for name in DEGREES)
        if odd or (rest != 1 and not open_):
            raise UserError(
                f"parallel: {said} does not make {processes} process{'es' * (processes != 1)}; "
                f"start {self.processes}, or set one degree to -1 (the rest)"
            )
        filled = {name: rest if name in open_ else getattr(self, name) for name in DEGREES}
        return Layout(**filled, stage=self.stage, context_exchange=self.context_exchange)
