"""The two kernels beside `scaled_dot_product_attention` that attention uses: one for CPUs, one for CUDA."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ropewalk.ops.attention_layout import Packing
from ropewalk.ops.product import float32_is_faster

SHORT = 256
"""Longest document whose bfloat16 gradient torch computes faster in float32: 3 to 5 times, with the casts."""
Prefix = tuple[Tensor, Tensor]


class CPUCausal(torch.autograd.Function):
    """Causal attention on a CPU, without any mask, after keys and values that all documents share or none.

    q `[n, heads, L, D]`, k and v `[n, kv_heads, L, D]`, the prefix's `[kv_heads, P, D]` or None. All queries
    attend to the prefix at once, as if they were one document, and the two results are weighted by their sums
    of exponentials; torch's kernel, given the sum over both parts, gives each part's share of the gradient.

    Short documents' gradients, and all on processors that are faster at it, are computed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before_k: Tensor | None,
        before_v: Tensor | None,
        scale: float,
    ) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = attend(q, k, v, 0.0, True, scale=scale)
        if before_k is not None and before_v is not None:
            other, other_sum = attend(_as_one(q), before_k[None], before_v[None], 0.0, False, scale=scale)
            other, other_sum = _as_many(other, len(q)), _as_many(other_sum, len(q))
            share = torch.sigmoid(other_sum - logsumexp).to(q.dtype)
            out = torch.lerp(out, other, share.unsqueeze(-1))
            logsumexp = torch.logaddexp(logsumexp, other_sum)
        ctx.save_for_backward(q, k, v, before_k, before_v, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, before_k, before_v, out, logsumexp = ctx.saved_tensors
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dtype = q.dtype
        cast = dtype == torch.bfloat16 and (q.shape[2] <= SHORT or float32_is_faster())
        wide = torch.float32 if cast else dtype
        grad, q, out = (t.to(wide) for t in (grad, q, out))
        dq, dk, dv = differentiate(
            grad, q, k.to(wide), v.to(wide), out, logsumexp, 0.0, True, scale=ctx.scale
        )
        before = None, None
        if before_k is not None:
            ones = [_as_one(t) for t in (grad, q, out, logsumexp)]
            shared = [t.to(wide)[None] for t in (before_k, before_v)]
            more, *before = differentiate(*ones[:2], *shared, *ones[2:], 0.0, False, scale=ctx.scale)
            dq = dq + _as_many(more, len(q))
            before = tuple(t[0].to(dtype) for t in before)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), *before, None


def _as_one(x: Tensor) -> Tensor:
    """`[n, heads, L, ...]` -> `[1, heads, n * L, ...]`: the documents as one."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _as_many(x: Tensor, n: int) -> Tensor:
    """`[1, heads, n * L, ...]` -> `[n, heads, L, ...]`."""
    return x[0].unflatten(1, (n, -1)).transpose(0, 1)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None, scale: float, prefix: Prefix | None
) -> Tensor:
    """CUDA, bfloat16 or float16: all documents in one call of torch's kernel for packed documents.

    q `[B * S, heads, D]`, k and v `[B * S, kv_heads, D]`, the prefix's `[P, kv_heads, D]` -> as q; padding
    gives zeros. The kernel aligns the last query with the last key, so that keys before a document come to
    stand where they should for the causal and the window rule.
    """
    from torch.nn.attention import varlen

    length = 0
    if prefix is not None and packing.keys is not None:
        length = prefix[0].shape[0]
        k, v = (torch.cat((p, t)).index_select(0, packing.keys) for p, t in zip(prefix, (k, v), strict=True))
    known = inspect.signature(varlen.varlen_attn).parameters  # they differ from torch 2.11 to 2.13
    options: dict[str, Any] = {"scale": scale}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    options["window_size"] = (-1 if window is None else window - 1, 0)
    longest = packing.longest
    starts = packing.query_starts, packing.key_starts
    out: Any = varlen.varlen_attn(q, k, v, *starts, longest, longest + length, **options)
    return out if packing.padding is None else out.masked_fill(packing.padding[:, None, None], 0.0)
