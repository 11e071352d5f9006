"""What torch's fully_shard takes beside a process's parts: weights gathered, and gradients on their way.

Seen with two processes on a CPU (torch 2.13). A unit is a block, or what is outside the blocks.
"""

from ropewalk.plan.weights import Parameter, Parameters, part_of
from ropewalk.plan.work import Work

Unit = tuple[Parameter, ...]


class Sharding:
    """The extra memory of one process among several; with one process there is none."""

    def __init__(self, work: Work, parameters: Parameters) -> None:
        self.work, self.parameters = work, parameters
        self.divided = work.layout.processes > 1
        self.stage = work.layout.stage
        self.adds_whole = self.divided and self.stage == 1 and work.accumulation > 1
        """gradients of whole weights are added up, and divided in the last micro-batch"""
        self.sizes = {id(block): self._whole(block) for block in parameters.blocks}
        self.largest = max(self.sizes.values())

    def gathered(self, moment: str) -> int:
        """Weights of other processes that are here at a moment: all that is outside the blocks, and of the
        blocks at stage 3 the one that computes, and going forward one that arrives (a GPU keeps what it came
        in until the next one has come)."""
        if not self.divided:
            return 0
        sizes, largest = self.sizes, self.largest
        ahead = self.work.device == "cuda"
        if self.stage == 3:
            blocks = {"forward": 2 + ahead, "loss": 0, "backward": 1 + ahead}[moment] * largest
        else:
            blocks = sum(sizes[id(block)] for block in self.parameters.blocks)
            blocks += largest * (moment == "forward")
        return self._whole(self.parameters.outside) + blocks

    def arriving(self) -> int:
        """Going backward at stage 3, the block before is gathered already, where there is one."""
        return self.largest if self.divided and self.stage == 3 else 0

    def _whole(self, unit: Unit) -> int:
        size = 0
        for p in unit:
            if p.quantized == "none":
                size += p.size * p.count * self.work.parameter_bytes
            elif self.work.layout.shard > 1:  # else it is not gathered
                size += sum(p.quantized_bytes()) * p.count
        return size

    def before(self) -> int:
        """Whole gradients in float32 that are there when the last micro-batch begins."""
        return sum(map(self._wide, (self.parameters.outside, *self.parameters.blocks))) * self.adds_whole

    def _wide(self, unit: Unit) -> int:
        """Of a unit's whole gradients in float32."""
        return 4 * sum(p.size * p.count for p in unit if p.trained)

    def _own(self, unit: Unit) -> int:
        """Numbers of a unit's gradients that are this process's."""
        return sum(part_of(p, self.work.layout) * p.count for p in unit if p.trained)

    def arrived(self, unit: Unit) -> int:
        """What more there is when a unit's gradients have been divided: this process's part; and until the
        backward pass ends their float32 sums, which fully_shard holds where it replicates."""
        numbers = self._own(unit)
        each, sums = self.work.parameter_bytes, 4 if self.work.layout.replicate > 1 else 0
        if each == 4:
            stays = 0 if self.work.accumulation > 1 and not self.adds_whole else 4
        elif self.work.accumulation == 1 or self.adds_whole:
            stays = 2 + sums
        else:
            stays = sums + (2 if self.work.accumulation == 2 else 0)
        return stays * numbers - self._wide(unit) * self.adds_whole

    def sent(self, unit: Unit) -> int:
        """A unit's whole gradients in float32, from which others take their parts; the next computes
        meanwhile."""
        return self._wide(unit) if self.divided else 0

    def dividing(self, unit: Unit) -> int:
        """Those of a block while they are divided: with this process's part of the sums, Gloo's own copy, and
        without the weights, which are let go before."""
        copies = 2 if self.work.device == "cpu" else 1
        return copies * self.sent(unit) + 4 * self._own(unit) - self.arriving()
