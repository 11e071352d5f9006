"""What may stand around a frozen linear layer: the common form, (IA)^3 vectors and bottleneck adapters."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropewalk.ops.quantized import QuantizedTensor


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear, `base`, and what is trained around it: the module's own parameters."""

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = dropout

    def merged(self) -> nn.Linear | None:
        """The base with the adapter worked into its weights in place, a quantized weight as a plain one.

        None where no weight can do what the adapter does.
        """
        return None

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def _new(self, *shape: int, fill: float = 0.0) -> nn.Parameter:
        weight = self.base.weight
        return nn.Parameter(torch.full(shape, fill, dtype=weight.dtype, device=weight.device))

    def _drawn(self, rows: int, columns: int, generator: torch.Generator | None) -> nn.Parameter:
        """Uniform as PEFT's A (kaiming with a = sqrt(5)); drawn on the CPU: the same on every device."""
        bound, weight = columns**-0.5, self.base.weight
        drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return nn.Parameter(drawn.to(device=weight.device, dtype=weight.dtype))


class IA3Linear(AdaptedLinear):
    """Scales the layer's outputs, or with `on_input` its inputs, by a learned `vector`.

    (IA)^3, arXiv 2205.05638. The vector starts as ones, so that the layer starts as its base.
    """

    def __init__(self, base: nn.Linear, on_input: bool) -> None:
        super().__init__(base)
        self.on_input = on_input
        self.vector = self._new(base.in_features if on_input else base.out_features, fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.base(x * self.vector) if self.on_input else self.base(x) * self.vector

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base, its weight (and bias) scaled in place; rounded once."""
        weight = plain_weight(self.base)
        weight.mul_(self.vector if self.on_input else self.vector[:, None])
        if self.base.bias is not None and not self.on_input:
            self.base.bias.mul_(self.vector)
        return self.base


class BottleneckLinear(AdaptedLinear):
    """A small network after the layer: y + up(gelu(down(y))) (Houlsby et al., arXiv 1902.00751).

    `down` [width, out] is drawn as LoRA's A is; `up` [out, width] and the biases start as zeros, so that the
    layer starts as its base. No weight matrix can do what it does: it cannot be merged.
    """

    def __init__(
        self, base: nn.Linear, width: int, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, dropout)
        self.down, self.down_bias = self._drawn(width, base.out_features, generator), self._new(width)
        self.up, self.up_bias = self._new(base.out_features, width), self._new(base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.base(x)
        low = F.linear(F.dropout(y, self.dropout, self.training), self.down, self.down_bias)
        return y + F.linear(F.gelu(low), self.up, self.up_bias)


def plain_weight(base: nn.Linear) -> nn.Parameter:
    """The layer's weight; a quantized one is replaced by what it stands for, in its dtype."""
    if isinstance(base.weight, QuantizedTensor):
        base.weight = nn.Parameter(base.weight.dequantize(), requires_grad=False)
    return base.get_parameter("weight")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
