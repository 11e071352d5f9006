"""Mixture of experts: top-k routing, and the load-balancing loss of Switch Transformer (arXiv 2101.03961)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.model.config import ModelConfig
from ropewalk.model.layers import MLP

RouterStatistics = tuple[Tensor, Tensor]
"""Per expert, `[num_experts]` float32 each: sum of router probabilities over the tokens (with gradient), and
how often the expert was chosen."""


class Experts(nn.ModuleList):
    """MLPs of one layer: all of them, or those that are here, under the names that they have among all."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows `[N, hidden_size]` in the order of the experts, of which each takes its `counts` `[experts]`
        -> the same shape."""
        # in training also those that nobody chose, whose gradients are so zeros in every process, not missing
        every = torch.is_grad_enabled()
        slices = rows.split(counts.tolist())
        outputs = [expert(part) for expert, part in zip(self, slices, strict=True) if every or len(part)]
        return torch.cat(outputs) if outputs else rows


RunExperts = Callable[[Experts, Tensor, Tensor], Tensor]


class MixtureOfExperts(nn.Module):
    """Each token goes to the experts that the router likes best; their outputs are weighted and added.

    `run_experts(experts, rows, counts)`, where it is set, calls the experts: the place for what sends rows to
    where their experts are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.num_experts = config.num_experts
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.run_experts: RunExperts = _here

    def forward(self, hidden: Tensor, real: Tensor | None) -> tuple[Tensor, RouterStatistics]:
        """hidden `[B, S, hidden_size]` -> (the same shape, statistics).

        `real` `[B * S]` bool is false at padding, which the statistics leave out; None: there is none.
        """
        x = hidden.flatten(0, 1)
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        # Sort the (token, expert) pairs by expert, so that each expert reads one contiguous slice.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        outputs = self.run_experts(self.experts, copies(x, order, self.top_k), counts)
        weighted = outputs * weights.flatten()[order].to(x.dtype).unsqueeze(-1)
        result = sums(weighted, order, self.top_k)
        return result.view(hidden.shape), self._statistics(probabilities, chosen, counts, real)

    def _statistics(
        self, probabilities: Tensor, chosen: Tensor, counts: Tensor, real: Tensor | None
    ) -> RouterStatistics:
        if real is None:
            return probabilities.sum(0), counts.float()
        counts = torch.bincount(chosen[real].flatten(), minlength=self.num_experts)
        return (probabilities * real.unsqueeze(-1)).sum(0), counts.float()


class _Regrouped(torch.autograd.Function):
    """`copies`, or with `back` `sums`: each is the other's gradient. torch's own would add the copies one by
    one in the rows' own type, on a GPU in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, each: int, back: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.each, ctx.back = each, back
        return _regrouped(rows, order, each, back)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _regrouped(slope, order, ctx.each, not ctx.back), None, None, None


def _regrouped(rows: Tensor, order: Tensor, each: int, back: bool) -> Tensor:
    if not back:
        return rows[order // each]
    return torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, (-1, each)).sum(1)


def copies(rows: Tensor, order: Tensor, each: int) -> Tensor:
    """[N, H] -> [N * each, H]: `each` of every row, in this order."""
    result: Tensor = _Regrouped.apply(rows, order, each, False)
    return result


def sums(rows: Tensor, order: Tensor, each: int) -> Tensor:
    """[N * each, H] -> [N, H]: the sums of what stands in the places of `copies`, each rounded once."""
    result: Tensor = _Regrouped.apply(rows, order, each, True)
    return result


def _here(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    return experts(rows, counts)


def load_balancing_loss(statistics: list[RouterStatistics], tokens: int | Tensor) -> Tensor:
    """0-d float32; as transformers computes it, over all layers at once.

    `tokens` is the number of tokens, padding excluded, that each layer saw. The loss is top_k when the load
    is even, more when it is not.
    """
    total = tokens * len(statistics)
    probabilities = torch.stack([p for p, _ in statistics]).sum(0) / total
    share = torch.stack([c for _, c in statistics]).sum(0) / total
    return (probabilities * share).sum() * len(share)
