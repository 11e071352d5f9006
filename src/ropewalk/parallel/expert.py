"""Expert parallelism (GShard, arXiv 2006.16668): each process has some of the experts of each mixture.

Every process routes its own tokens. Their hidden states go to the processes that have the chosen experts, and
what those made of them comes back: two all-to-all exchanges forward, two backward. However many rows a
process gets, it computes them all: there is no capacity, and no token is dropped.

The degree takes no processes of its own: neighbours among those that share the rows, tokens and products of
everything else divide the experts. Processes with the same experts share these as `shard` shares other
weights, or hold copies of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ropewalk.layout import Layout
from ropewalk.model import ModelConfig, Transformer
from ropewalk.model.moe import Experts, MixtureOfExperts
from ropewalk.parallel.collectives import exchanged
from ropewalk.parallel.world import World


def expert_refusal(config: ModelConfig, layout: Layout) -> str | None:
    """Why this model's experts cannot be divided so, and the nearest degree that can; or None."""
    if layout.expert == 1:
        return None
    if not config.moe_layers:
        return f"this {config.family} model has no experts; set parallel.expert: 1"
    if config.num_experts % layout.expert == 0:
        return None
    fits = layout.nearest_expert(d for d in range(1, config.num_experts + 1) if config.num_experts % d == 0)
    return f"{layout.expert} does not divide {config.num_experts} experts; set parallel.expert: {fits}"


def divide_experts(model: Transformer, world: World) -> None:
    """Leaves each process its experts, under their names, in place; and lets rows go to the others'.

    The layout is one that `expert_refusal` has nothing against.
    """
    exchange = _Exchange(world.group("expert"), world.layout.expert)
    for block in model.blocks.children():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        experts, share = block.mlp.experts, block.mlp.num_experts // world.layout.expert
        first = world.index("expert") * share
        for index in range(block.mlp.num_experts):
            if not first <= index < first + share:
                del experts._modules[str(index)]
        block.mlp.run_experts = exchange.run


class _Exchange:
    """What the processes of an expert group send each other; process i has the i-th part of the experts."""

    def __init__(self, group: Any, degree: int) -> None:
        self.group, self.degree = group, degree

    def run(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        """rows `[N, hidden_size]` in the order of all experts, of which each takes its `counts`
        `[num_experts]` -> the same shape."""
        theirs = torch.empty_like(counts)  # by process, then by expert of those here
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent = counts.view(self.degree, -1).sum(1).tolist()
        here = theirs.view(self.degree, -1)
        got = here.sum(1).tolist()
        if torch.is_grad_enabled() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # all come to the exchange of gradients, or nobody

        def there(rows: Tensor) -> Tensor:
            return self._traded(rows, sent, got)

        def back(rows: Tensor) -> Tensor:
            return self._traded(rows, got, sent)

        arrived = exchanged(rows, there, back)
        expert = torch.arange(here.shape[1], device=rows.device).repeat(self.degree)
        order = expert.repeat_interleave(theirs).argsort(stable=True)
        made = experts(arrived[order], here.sum(0))
        return exchanged(torch.empty_like(made).index_copy(0, order, made), back, there)

    def _traded(self, rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """Rows `[sum(sent), H]`, `sent[i]` of them to process i -> `[sum(got), H]`, by process."""
        found = rows.new_empty(sum(got), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), got, sent, group=self.group)
        return found
