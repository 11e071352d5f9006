"""How a run is spread over processes: the degrees, and the one rule that they obey."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ropewalk.errors import UserError

REST = -1
DEGREES = ("pipeline", "replicate", "shard", "context", "tensor")
"""in the order of the processes: those of one `tensor` group are neighbours"""

Schedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zb", "zbv"]
ONE_STAGE = ("gpipe", "1f1b")
"""schedules in which a process has one stage; in the others it has several"""
ZERO_BUBBLE = ("interleaved-zb", "zbv")
"""schedules that make the gradients of a stage's weights apart from those of its input (arXiv 2401.10241)"""


def told_by_launcher(variable: str) -> int | None:
    """WORLD_SIZE, LOCAL_RANK and the like, as torchrun or a scheduler in its manner sets them; None where
    nobody did. UserError for what is no such number."""
    said = os.environ.get(variable)
    if said is None:
        return None
    if not said.isdecimal() or (variable.endswith("WORLD_SIZE") and int(said) == 0):
        raise UserError(f"the environment variable {variable} is {said!r}; it must be a number of processes")
    return int(said)


@dataclass(frozen=True, kw_only=True)
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
    expert: int = 1
    """processes that divide the experts of a mixture: of those above, no others"""
    context_exchange: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """how attention reaches the tokens that other processes of a `context` group have"""
    stage: Literal[1, 2, 3] = 3
    """what is divided (ZeRO, arXiv 1910.02054): 1 optimizer states, 2 gradients too, 3 weights too"""
    pipeline: int = 1
    """groups of processes that each have some of the blocks: hidden states go from one to the next"""
    pipeline_schedule: Schedule = "1f1b"
    """in which order a process of a `pipeline` group does the forward and backward passes of micro-batches"""
    pipeline_stages: int | None = None
    """runs of blocks that each of them has; None: as few as the schedule allows"""

    @property
    def data(self) -> int:
        """Parts into which the rows of a batch are divided."""
        return self.replicate * self.shard

    @property
    def parts(self) -> int:
        """Parts into which weights and states are divided: processes that share rows share the model, too."""
        return self.shard * self.context

    @property
    def with_same_blocks(self) -> int:
        """Processes that have (parts or copies of) the same blocks, and train them on all rows together."""
        return self.processes // self.pipeline

    @property
    def expert_parts(self) -> int:
        """Parts into which each expert is divided: what `expert` leaves of the processes of one model."""
        return max(1, self.parts * self.tensor // self.expert)

    @property
    def expert_copies(self) -> int:
        """Processes with the same part of the same experts."""
        return self.with_same_blocks // (self.expert * self.expert_parts)

    @property
    def whole(self) -> int:
        """Rows have a multiple of so many tokens: a process of a `context` group has one piece of their
        beginning and one of their end, of which each of a `tensor` group takes some."""
        return (2 * self.context if self.context > 1 else 1) * self.tensor

    @property
    def stages_each(self) -> int:
        """Runs of blocks that a process of a `pipeline` group has."""
        if self.pipeline == 1:
            return 1
        return self.pipeline_stages or (1 if self.pipeline_schedule in ONE_STAGE else 2)

    @property
    def split_backward(self) -> bool:
        """Whether the schedule makes gradients of weights apart from those of a stage's input."""
        return self.pipeline > 1 and self.pipeline_schedule in ZERO_BUBBLE

    @property
    def stages(self) -> int:
        """Runs of blocks in all."""
        return self.pipeline * self.stages_each

    def place(self, stage: int) -> int:
        """The process of a `pipeline` group that has a stage: each in turn, or (zbv) there and back."""
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if self.pipeline_schedule == "zbv" and turn % 2 else place

    def takes(self, micro_batches: int) -> bool:
        """Whether the schedule can do so many micro-batches in a step."""
        if self.pipeline == 1 or self.pipeline_schedule in ("gpipe", "zbv"):
            return True
        if self.pipeline_schedule == "1f1b":
            return micro_batches >= self.pipeline
        return micro_batches % max(1, micro_batches // self.pipeline) == 0  # rounds of equal length

    @property
    def processes(self) -> int:
        """How many it takes; a degree that is "the rest" counts as one."""
        return math.prod(max(1, getattr(self, name)) for name in DEGREES)

    @property
    def _product(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in DEGREES)

    def over(self, processes: int) -> "Layout":
        """The same with its -1 filled in. UserError where the degrees do not make `processes`."""
        for name in (*DEGREES, "expert"):
            if (degree := getattr(self, name)) < 1 and degree != REST:
                raise UserError(f"parallel.{name} is {degree}; it must be at least 1, or -1 (the rest)")
        open_ = [name for name in DEGREES if getattr(self, name) == REST]
        if len(open_) > 1:
            raise UserError(f"parallel: {' and '.join(open_)} are both -1 (the rest); give one of them")
        rest, odd = divmod(processes, self.processes)
        if odd or (rest != 1 and not open_):
            raise UserError(
                f"parallel: {self._product} does not make {processes} process{'es' * (processes != 1)}; "
                f"start {self.processes}, or set one degree to -1 (the rest)"
            )
        filled: dict[str, Any] = dict.fromkeys(open_, rest)
        whole = replace(self, **filled)
        return replace(
            whole, expert=whole.with_same_blocks if self.expert == REST else whole._checked_expert()
        )

    def nearest_expert(self, degrees: Iterable[int]) -> int:
        """Of `degrees` (with 1) of `expert` the nearest to this one that the other degrees allow."""
        return min(filter(self._allows_expert, degrees), key=lambda d: (abs(d - self.expert), -d))

    def _checked_expert(self) -> int:
        if self._allows_expert(self.expert):
            return self.expert
        near = range(1, min(self.with_same_blocks, 2 * self.expert) + 1)
        raise UserError(
            f"parallel.expert: it takes no processes of its own, and {self._product} cannot be cut into "
            f"groups of {self.expert}; set it to {self.nearest_expert(near)}, or "
            f"parallel.shard to a multiple of {self.expert}"
        )

    def _allows_expert(self, degree: int) -> bool:
        """A group lies within one model, or is made of whole ones; and all of it has the same blocks."""
        model = self.parts * self.tensor
        return model % degree == 0 or (degree % model == 0 and self.with_same_blocks % degree == 0)
