"""RMSNorm (arXiv 1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.ops.reference import using_references


def rms_norm_reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension, in float32 (or float64), rounded once."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * scale.to(h.dtype)).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Same function as `rms_norm_reference`; x is `[..., size]`, scale `[size]`, maybe of another dtype.

    torch has no fused kernel for it on the CPU. There a version with less memory traffic stands in: forward
    and backward take a quarter of the time of the written-out formula.
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
    h = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    r = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    r = r.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return h.mul_(r).mul_(scale).to(x.dtype), r


class _RMSNorm(torch.autograd.Function):
    """The backward pass borrows LayerNorm's fused one.

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
        dx, dscale, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(r), r, factor, None, [need_x, need_scale, False]
        )
        if need_x:
            mean = grad.to(r.dtype) @ (factor / size)
            dx.add_(mean.unsqueeze(-1).mul_(r).to(dx.dtype))
        return dx if need_x else None, dscale.to(scale.dtype) if need_scale else None, None
