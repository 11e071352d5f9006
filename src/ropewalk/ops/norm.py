"""RMSNorm (arXiv 1910.07467) and LayerNorm (1607.06450).

Gradients of scales and biases are summed in float32. torch's LayerNorm sums them in bfloat16 on a CPU: over
4,096 rows a bias's gradient was 10% off, over 16,384 58%.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.ops.native import run_on, takes
from ropewalk.ops.reference import using_references

_BLOCK = 1 << 18
"""Numbers of a block of rows in float32, whose share of a scale's gradient is summed at once."""
_PARTS = 64
"""Parts of the rows that a scale's gradient is summed over, by any number of threads: always the same sum."""


def rms_norm_reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension, in float32 (or float64), rounded once."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * scale.to(h.dtype)).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Same function as `rms_norm_reference`; x is `[..., size]`, scale `[size]`, maybe of another dtype.

    torch has no fused kernel for it on the CPU: there it is one in C++ or, where that cannot be compiled, a
    version with less memory traffic than the written-out formula.
    """
    if using_references():
        return rms_norm_reference(x, scale, eps)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, scale, eps) if torch.is_grad_enabled() else _normalize(x, scale, eps)[0]
    if scale.dtype != x.dtype:  # gemma's 1 + weight is float32, and rounding it would be seen
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(h, scale.shape, scale.to(h.dtype), eps).to(x.dtype)
    return F.rms_norm(x, scale.shape, scale, eps)


def _normalize(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and (float32, or float64) `1 / sqrt(mean(x^2) + eps)` with a last dimension of 1."""
    if takes(x):
        return _native(x.contiguous(), scale.to(torch.float32), eps)
    h = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    r = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    r = r.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return h.mul_(r).mul_(scale).to(x.dtype), r


class _RMSNorm(torch.autograd.Function):
    """The backward pass, where it has no kernel, borrows LayerNorm's fused one.

    LayerNorm's, told that the mean is 0, gives `r * (u - mean(u) - n * mean(u * n))`, where u = grad * scale
    and n = x * r; that is RMSNorm's gradient but for the `mean(u)`, which is put back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, r = _normalize(x, scale, eps)
        ctx.save_for_backward(x, scale, r)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, r = ctx.saved_tensors
        size, factor = x.shape[-1], scale.to(r.dtype)
        need_x, need_scale = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        if takes(x):
            dx, dscale = _native_slopes(grad, x.contiguous(), factor, r, need_scale)
            return dx if need_x else None, dscale.to(scale.dtype) if need_scale else None, None
        zero, dx = torch.zeros_like(r), None
        if need_x:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, [size], zero, r, factor, None, [True, False, False]
            )
            mean = grad.to(r.dtype) @ (factor / size)
            dx.add_(mean.unsqueeze(-1).mul_(r).to(dx.dtype))
        return dx, _scale_slope(grad, x, zero, r).to(scale.dtype) if need_scale else None, None


def _scale_slope(grad: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """Sum over the rows of `grad * (x - mean) * r`."""
    rows, total = max(1, _BLOCK // x.shape[-1]), r.new_zeros(x.shape[-1])
    parts = (t.flatten(0, -2).split(rows) for t in (grad, x, mean, r))
    for g, some, m, inverse in zip(*parts, strict=True):
        total += (some.to(r.dtype) - m).mul_(inverse).mul_(g).sum(0)
    return total


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's: `(x - mean) / sqrt(variance + eps) * scale + bias` over the last dimension."""
    low = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if low and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = _LayerNorm.apply(x, scale, bias, eps)
        return y
    return F.layer_norm(x, scale.shape, scale, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, scale.shape, scale, bias, eps)
        ctx.save_for_backward(x, scale, bias, mean, r)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, scale, bias, mean, r = ctx.saved_tensors
        need_x, need_scale, need_bias, _ = ctx.needs_input_grad
        dx = dscale = None
        if need_x:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, scale.shape, mean, r, scale, bias, [True, False, False]
            )
        if need_scale:
            dscale = _scale_slope(grad, x, mean.float(), r.float()).to(scale.dtype)
        return dx, dscale, grad.flatten(0, -2).sum(0) if need_bias else None, None


@torch.library.custom_op("ropewalk::norm", mutates_args=())
def _native(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`_normalize` of a contiguous x."""
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    run_on(x, "norm", scale, eps, inverse.numel(), x.shape[-1], y, inverse)
    return y, inverse


@_native.register_fake
def _(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("ropewalk::norm_slopes", mutates_args=())
def _native_slopes(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, need_scale: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, where needed (else it has no numbers), of the scale, in float32."""
    dx, rows = torch.empty_like(x), inverse.numel()
    parts = max(1, min(_PARTS, rows))
    sums = x.new_empty(parts, x.shape[-1], dtype=torch.float32) if need_scale else None
    run_on(grad, "norm_slopes", x, scale, inverse, rows, x.shape[-1], dx, sums, parts)
    return dx, scale.new_empty(0) if sums is None else sums.sum(0)


@_native_slopes.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, need_scale: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(x.shape[-1] if need_scale else 0)
