"""RMSNorm (arXiv 1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension, in float32, rounded to x's dtype once."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * scale.float()).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Same function as `rms_norm_reference`.

    x is `[..., size]`, scale `[size]`. Where autograd runs on a CPU it takes a formula with a quarter of the
    memory traffic, because torch has no fused kernel there; elsewhere it is F.rms_norm.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, scale.float(), eps)
    return F.rms_norm(x, (x.shape[-1],), scale.to(x.dtype) if scale.dtype != x.dtype else scale, eps)


class _RMSNorm(torch.autograd.Function):
    """The backward pass borrows LayerNorm's fused one.

    LayerNorm's, told that the mean is 0, gives `r * (u - mean(u) - n * mean(u * n))` with u = grad * scale and
    n = x * r; that is RMSNorm's gradient but for the `mean(u)`, which is put back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        h = x.float() if x.dtype != torch.float32 else x.clone()
        size = h.shape[-1]
        r = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        return h.mul_(r).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, r = ctx.saved_tensors
        size = x.shape[-1]
        need_x, need_scale = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        dx, dscale, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(r), r, scale, None, [need_x, need_scale, False]
        )
        if need_x:
            mean = grad.float() @ (scale / size)
            dx.add_(mean.unsqueeze(-1).mul_(r).to(dx.dtype))
        return dx if need_x else None, dscale if need_scale else None, None
