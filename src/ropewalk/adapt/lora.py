"""Low-rank adapters beside frozen linear layers: LoRA, rsLoRA and DoRA."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropewalk.adapt.layers import AdaptedLinear, plain_weight
from ropewalk.ops.lora import lora_linear
from ropewalk.ops.quantized import dense


class LoRALinear(AdaptedLinear):
    """y = base(x) + scale * B A dropout(x), with `lora_a` [rank, in] and `lora_b` [out, rank].

    LoRA, arXiv 2106.09685. A is drawn uniformly as PEFT's, B is zero, so that the layer starts as its base.
    The scale is alpha / rank, or alpha / sqrt(rank) if `rank_stabilized` (rsLoRA, arXiv 2312.03732).
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__(base, dropout)
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self.lora_a = self._drawn(rank, base.in_features, generator)
        self.lora_b = self._new(base.out_features, rank)

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.dropout and self.training:
            return self.base(x) + self._update(F.dropout(x, self.dropout))
        if torch.is_grad_enabled():
            return lora_linear(x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)
        return self.base(x) + self._update(x)

    def _update(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with `scale * B A` added to its weight in place; float32 sums, rounded once."""
        weight = plain_weight(self.base)
        weight.copy_(self._sum(weight))
        return self.base

    def _sum(self, weight: Tensor) -> Tensor:
        """weight + scale * B A in float32, or wider where the weight is."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide).addmm_(self.lora_b.to(wide), self.lora_a.to(wide), alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def row_lengths(weight: Tensor) -> Tensor:
    """|row| of each row of a matrix, `[rows]` in float32, or wider where the matrix is."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


class DoRALinear(LoRALinear):
    """LoRA on the direction of each row of the weight, and a learned `magnitude` [out] for its length.

    DoRA, arXiv 2402.09353: y = magnitude / |W + scale * B A| * (W + scale * B A) x + bias. The lengths |.|
    of the rows are constants to the backward pass (section 4.3). As in PEFT, dropout is on what differs from
    the base.
    """

    def __init__(self, base: nn.Linear, *arguments: Any, **options: Any) -> None:
        """The arguments are LoRALinear's."""
        super().__init__(base, *arguments, **options)
        self.magnitude = nn.Parameter(self.lengths())

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W + scale * B A| of each row, `[out]` in the weight's dtype.

        From |W|^2, W A^T and A A^T: nothing of the weight's size is made.
        """
        weight = dense(self.base.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.lora_a.to(wide), self.scale * self.lora_b.to(wide)
        cross = (weight @ self.lora_a.t()).to(wide)
        squares = row_lengths(weight).square()
        squares += (b * (2 * cross + b @ (a @ a.t()))).sum(1)
        return squares.clamp_(min=0).sqrt_().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        weight, bias = self.base.weight, self.base.bias
        factor = self.magnitude / self.lengths()
        if self.dropout and self.training:
            dropped = F.dropout(x, self.dropout)
            changed = factor * self._update(dropped) + (factor - 1) * F.linear(dropped, weight)
            return self.base(x) + changed
        if torch.is_grad_enabled():
            y = lora_linear(x, weight, None, self.lora_a, self.lora_b, self.scale)
        else:
            y = F.linear(x, weight) + self._update(x)
        return y * factor if bias is None else torch.addcmul(bias, y, factor)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with its weight replaced in place; float32 products, rounded once."""
        factor = self.magnitude / self.lengths()
        weight = plain_weight(self.base)
        weight.copy_(self._sum(weight).mul_(factor[:, None]))
        return self.base
