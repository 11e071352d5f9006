"""Which blocks each process of a `pipeline` group has, and how it evaluates a model of which it has those.

Blocks go in consecutive runs, stages, to the processes. The embedding is with the first block, the last norm
and the head with the last one. Where the head is the embedding, both ends have that matrix. Parameters keep
their names, so that nothing else need know.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ropewalk.layout import Layout
from ropewalk.model import ModelConfig, Transformer
from ropewalk.model.transformer import BlocksPart, RunSpan
from ropewalk.parallel.world import World


def pipeline_refusal(config: ModelConfig, layout: Layout) -> str | None:
    """Why this model's blocks cannot be shared so, and the nearest degree at which they can; or None."""
    blocks, each = config.num_hidden_layers, layout.stages_each
    if layout.pipeline == 1 or layout.stages <= blocks:
        return None
    fits = blocks // each
    stages = f"{layout.pipeline} processes" + (f" with {each} stages each" if each > 1 else "")
    way = f"set parallel.pipeline: {max(1, fits)}"
    if each > 1 and fits < 2:
        way += ", or parallel.pipeline_schedule: 1f1b"
    return f"{stages} need {layout.stages} blocks, and the model has {blocks}; {way}"


def spans(costs: Sequence[float], head: float, stages: int) -> list[range]:
    """Runs of blocks, one block at least in each, so that the costliest stage costs least.

    `costs`: of each block; the last stage has the head's besides. Among equals the one with the smallest sum
    of squares, which is the most even one.
    """
    count = len(costs)
    if len(set(costs)) == 1 and stages > 1:  # the last stage has some, the others as many as one another
        ways = []
        for last in range(1, count - stages + 2):
            each, more = divmod(count - last, stages - 1)
            sizes = [each] * (stages - 1 - more) + [each + 1] * more + [last]
            loads = [size * costs[0] + head * (i == stages - 1) for i, size in enumerate(sizes)]
            ways.append((max(loads), sum(load * load for load in loads), sizes))
        ends = tuple(accumulate(min(ways)[2]))
        return [range(start, stop) for start, stop in pairwise((0, *ends))]
    sums = [sum(costs[:i]) for i in range(count + 1)]

    @cache
    def best(start: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(the costliest stage, sum of squares, ends) of the blocks from `start` on in `left` stages."""
        if left == 1:
            cost = sums[count] - sums[start] + head
            return cost, cost * cost, (count,)
        found = []
        for stop in range(start + 1, count - left + 2):
            cost = sums[stop] - sums[start]
            most, squares, ends = best(stop, left - 1)
            found.append((max(cost, most), squares + cost * cost, (stop, *ends)))
        return min(found)

    ends = best(0, stages)[2]
    return [range(start, stop) for start, stop in pairwise((0, *ends))]


def keep_stages(model: Transformer, world: World, stages: Sequence[range]) -> None:
    """Leaves this process its blocks, and what is before the first or after the last of all, in place."""
    layout, index = world.layout, world.index("pipeline")
    mine = {str(i) for stage, span in enumerate(stages) if layout.place(stage) == index for i in span}
    for name in list(model.blocks._modules):
        if name not in mine:
            del model.blocks._modules[name]
    first, last = layout.place(0) == index, layout.place(len(stages) - 1) == index
    tied = model.config.tie_word_embeddings
    if not (first or (tied and last)):
        _drop(model.embed)
    if not first and model.config.position == "learned":
        _drop(model.embed_positions)
    if not last:
        model.norm = nn.Identity()
        if not (tied and first):
            _drop(model.head)
    relay = _Relay(world, stages, model)
    model.blocks_part = BlocksPart(relay.through, last, relay.shared)


def _drop(module: nn.Module) -> None:
    """Takes its weight away; what is left in its place has no numbers, but says their type and device."""
    weight = module._parameters.pop("weight")
    assert weight is not None
    module.weight = weight.detach().new_empty(0, weight.shape[1])


class _Relay:
    """Takes hidden states through the stages one after the other, without gradients: for evaluation.

    A process that has sent a batch on takes the next one, so that several are under way.
    """

    def __init__(self, world: World, stages: Sequence[range], model: Transformer) -> None:
        self.world, self.stages = world, stages
        self.group, self.index = world.group("pipeline"), world.index("pipeline")
        self.size, self.like = model.config.hidden_size, model.embed.weight.detach()[:0]
        self._sent: list[tuple[Any, Tensor]] = []

    def through(self, run: RunSpan, shape: tuple[int, ...]) -> Tensor:
        hidden: Tensor | None = None
        self._wait()
        place = self.world.layout.place
        for stage, span in enumerate(self.stages):
            if place(stage) != self.index:
                continue
            if stage and place(stage - 1) != self.index:
                hidden = self.like.new_empty(*shape, self.size)
                dist.recv(hidden, group=self.group, group_src=place(stage - 1))
            hidden = run(span, hidden if stage else None)
            if span is not self.stages[-1] and place(stage + 1) != self.index:
                sent = hidden.contiguous()
                work = dist.isend(sent, group=self.group, group_dst=place(stage + 1))
                self._sent.append((work, sent))
        if place(len(self.stages) - 1) != self.index:
            return self.like.new_zeros(*shape, self.size)
        assert hidden is not None
        return hidden

    def shared(self, value: Tensor) -> Tensor:
        self._wait()
        return self.world.broadcast_along_pipeline(value.contiguous(), len(self.stages) - 1)

    def _wait(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
