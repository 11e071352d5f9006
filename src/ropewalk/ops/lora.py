"""A frozen linear layer with a low-rank adapter beside it (LoRA, arXiv 2106.09685), and the plain form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.ops.product import add_product, product
from ropewalk.ops.quantized import dense, dequantized
from ropewalk.ops.reference import using_references


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """`x @ weight.T + bias + scale * (x @ lora_a.T) @ lora_b.T`; weight and bias are frozen: no gradients.

    x [..., in], weight [out, in], bias [out], lora_a [r, in], lora_b [out, r], all of one dtype ->
    [..., out]. The weight may be a QuantizedTensor that dequantizes to that dtype: it is dequantized anew for
    each of the two products with it, into a buffer that all weights share. Every small product goes through
    the rank, each sum is added in place by the product that makes it, and besides the weights only x and
    x @ lora_a.T are kept for the backward pass. No double backward.
    """
    if using_references():
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale)
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """The same in plain PyTorch."""
    return F.linear(x, dequantized(weight), bias) + scale * F.linear(F.linear(x, lora_a), lora_b)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ lora_a.t()
        y = product(rows, dense(weight).t(), bias)
        y = add_product(y, low, lora_b.t(), scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        rows, slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
        d_low = slope @ (lora_b * ctx.scale)
        d_a = d_low.t() @ rows if needs_a else None
        d_b = (slope.t() @ low).mul_(ctx.scale) if needs_b else None
        d_x = add_product(product(slope, dense(weight)), d_low, lora_a).view_as(x) if needs_x else None
        return d_x, None, None, d_a, d_b, None
