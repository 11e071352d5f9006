"""Low-rank adapters beside frozen linear layers (LoRA, arXiv 2106.09685)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropewalk.adapt.targets import select
from ropewalk.errors import UserError
from ropewalk.model.transformer import Transformer
from ropewalk.ops.lora import lora_linear


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt, and how: y = base(x) + alpha / rank * B A dropout(x)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class LoRALinear(nn.Module):
    """A frozen nn.Linear (`base`) with `lora_a` [rank, in] and `lora_b` [out, rank] beside it, in its dtype.

    A is uniform as PEFT's (kaiming with a = sqrt(5)), drawn from `generator` on the CPU so that it is the
    same on every device; B is zero, so that the layer starts as its base.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        bound = base.in_features**-0.5
        drawn = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(drawn.to(base.weight))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.is_grad_enabled() and not (self.dropout and self.training):
            return lora_linear(x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)
        return self.base(x) + self.scale * F.linear(low, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with `scale * B A` added to its weight in place; float32 sums, rounded once."""
        weight = self.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide).addmm_(self.lora_b.to(wide), self.lora_a.to(wide), alpha=self.scale))
        return self.base

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def apply_lora(model: Transformer, config: LoraConfig, seed: int = 0) -> list[str]:
    """Freezes the model and puts adapters beside its target layers, in place; returns their names.

    A layer's initial A depends only on `seed`, the targets and the model's shape. Raises UserError for an
    unknown target and for a model that carries adapters already.
    """
    check_plain(model)
    names = select(model, config.targets)
    generator = torch.Generator().manual_seed(seed)
    adapt(model, {name: (config.rank, config.alpha) for name in names}, config.dropout, generator)
    return names


def adapt(
    model: Transformer,
    ranks: dict[str, tuple[int, float]],
    dropout: float,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes the model and puts a new adapter of (rank, alpha) beside each named layer, in place."""
    model.requires_grad_(False)
    for name, (rank, alpha) in ranks.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, LoRALinear(base, rank, alpha, dropout, generator), strict=True)


def check_plain(model: Transformer) -> None:
    """Raises UserError for a model that carries adapters."""
    if carrying := unmerged(model):
        raise UserError(f"the model carries adapters already ({carrying[0]}, ...); merge them first")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name: all that LoRA trains."""
    return {
        f"{name}.{kind}": getattr(layer, kind)
        for name, layer in lora_layers(model)
        for kind in ("lora_a", "lora_b")
    }


def unmerged(model: nn.Module) -> list[str]:
    """Names of the layers that carry an adapter."""
    return [name for name, _ in lora_layers(model)]


def merge(model: Transformer) -> None:
    """Adds the adapters to the weights beside them and takes them away, in place; nothing stays frozen.

    The merged weights have the base's dtype: in float32 the logits stay within rounding, in bfloat16 the sum
    is rounded to bfloat16.
    """
    for name, layer in list(lora_layers(model)):
        model.set_submodule(name, layer.merged(), strict=True)
    model.requires_grad_(True)
