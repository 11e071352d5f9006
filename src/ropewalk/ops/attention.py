"""Causal attention over packed rows, and over a key-value cache.

A packed row costs what its documents cost: attention runs document by document, neighbours of equal length
together, and nothing masks one document from another. Keys and values are never repeated for grouped queries.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropewalk.ops.attention_cpu import ALL, cpu_attention, takes
from ropewalk.ops.attention_kernels import CPUCausal, Prefix, packed_attention
from ropewalk.ops.attention_layout import AttentionLayout, causal_band
from ropewalk.ops.product import float32_is_faster
from ropewalk.ops.reference import using_references

_QUERY_BLOCK = 1024
"""Most queries whose mask or scores are held at once."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: AttentionLayout,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Causal attention within each document.

    q is `[B, S, heads, D]`, k and v `[B, S, kv_heads, D]`, kv_heads a divisor of heads; the result is as q.
    `window`: keys a query sees, itself included. `softcap` c: scores become `c * tanh(score / c)` (gemma2).
    `scale`: factor on q.k, by default `D ** -0.5`. `prefix`: keys and values, each `[P, kv_heads, D]`, that
    stand before every document: query i of a document has index P + i, and a window counts from there.
    Padding gives zeros.

    Memory grows linearly with the length of a document. Kernels: see `attention_cpu`, `_is_packed` and
    `_documents`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if using_references():
        return attention_reference(q, k, v, layout.segments(len(q), q.device), window, softcap, scale, prefix)
    if prefix is None and takes(q, scale):
        fq, fk, fv = (t.flatten(0, 1) for t in (q, k, v))
        rules = layout.longest_first, window or ALL, softcap or 0.0, scale
        return cpu_attention(fq, fk, fv, *rules)[0].view(q.shape)
    if _is_packed(q, layout, window, softcap, prefix):
        packing = layout.packing(0 if prefix is None else len(prefix[0]), q.device)
        fq, fk, fv = (t.flatten(0, 1) for t in (q, k, v))
        return packed_attention(fq, fk, fv, packing, window, scale, prefix).view(q.shape)
    if prefix is not None:
        prefix = prefix[0].transpose(0, 1), prefix[1].transpose(0, 1)
    if len(layout.runs) == 1 and not layout.runs[0].padding:
        run = layout.runs[0]
        dq, dk, dv = (t.reshape(run.count, run.length, *t.shape[2:]) for t in (q, k, v))
        return _documents(dq, dk, dv, layout, window, softcap, scale, prefix).reshape(q.shape)
    # One split for each input, so that its backward pass is one concatenation.
    sizes = [run.tokens for run in layout.runs]
    pieces = zip(*(t.flatten(0, 1).split(sizes) for t in (q, k, v)), strict=True)
    outputs = []
    for run, piece in zip(layout.runs, pieces, strict=True):
        if run.padding:
            outputs.append(torch.zeros_like(piece[0]))
            continue
        dq, dk, dv = (t.unflatten(0, (run.count, run.length)) for t in piece)
        outputs.append(_documents(dq, dk, dv, layout, window, softcap, scale, prefix).flatten(0, 1))
    return torch.cat(outputs).view(q.shape)


def _is_packed(
    q: Tensor, layout: AttentionLayout, window: int | None, softcap: float | None, prefix: Prefix | None
) -> bool:
    """Whether torch's kernel for packed documents takes it all in one call.

    Preferred on CUDA where it can: there a call for each document costs more than the document, and the other
    kernels need a mask for a window or a prefix. Documents of one length without those are left to
    scaled_dot_product_attention, which takes cuDNN's kernel on an H100: 2.1 ms for two of 4,096 tokens, where
    flash took 4.0 and the packed kernel 3.8.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or softcap is not None:
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256  # flash attention's limits
    return fits and (len(layout.runs) > 1 or window is not None or prefix is not None)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    window: int | None,
    softcap: float | None,
    scale: float,
    prefix: Prefix | None,
) -> Tensor:
    """Documents of equal length: q `[n, L, heads, D]`, k and v `[n, L, kv_heads, D]` -> as q.

    The prefix's are `[kv_heads, P, D]`.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length, before = q.shape[2], 0 if prefix is None else prefix[0].shape[1]
    window = None if window is None or window >= before + length else window
    if window is None and softcap is None:
        on_cpu = q.device.type == "cpu"
        cast = q.dtype == torch.bfloat16 and float32_is_faster()
        if on_cpu and ((cast and torch.is_grad_enabled()) or prefix is not None):
            return CPUCausal.apply(q, k, v, *(prefix or (None, None)), scale).transpose(1, 2)
        if prefix is None:
            return _sdpa(q, k, v, None, True, scale).transpose(1, 2)
    # Blocks of queries with just the keys they see: memory grows with the window, not with length squared.
    block = _QUERY_BLOCK if window is None else min(max(window, 128), _QUERY_BLOCK)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, before_k: Tensor | None, before_v: Tensor | None, start: int
    ) -> Tensor:
        stop = min(start + block, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        some_k = _between(k, before_k, first - before, stop)
        some_v = _between(v, before_v, first - before, stop)
        place = window or before + length, stop - start, before + start - first, q.device
        if softcap is None:
            # masks of whole rows are many and large: only those of a window, or of a short row, are kept
            kept = window is not None or length <= block
            mask = layout.band(*place, q.dtype) if kept else causal_band(*place)
            return _sdpa(q[:, :, start:stop], some_k, some_v, mask, False, scale)
        return _softcapped(q[:, :, start:stop], some_k, some_v, causal_band(*place), softcap, scale)

    starts = range(0, length, block)
    run: Callable[..., Tensor] = attend
    if len(starts) > 1 and torch.is_grad_enabled() and (softcap is not None or window is None):
        # the scores or masks of all blocks together would be length squared: made again for the backward pass
        # (of arguments: what a closure holds, a checkpoint around this one could not free)
        run = partial(checkpoint, attend, use_reentrant=False)
    outputs = [run(q, k, v, *(prefix or (None, None)), start) for start in starts]
    return (torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]).transpose(1, 2)


def _between(x: Tensor, prefix: Tensor | None, first: int, stop: int) -> Tensor:
    """Keys or values `[n, kv_heads, ., D]` from `first` to `stop`; the prefix has the negative places."""
    if prefix is None or first >= 0:
        return x[:, :, max(first, 0) : stop]
    return torch.cat((prefix[:, first:].expand(len(x), -1, -1, -1), x[:, :, :stop]), 2)


def attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Queries over the slots of a key-value cache.

    q is `[B, S, heads, D]`, k and v `[B, kv_heads, slots, D]`, the result as q. `mask`, from `cached_mask`,
    says which slots a query sees; None: all of them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.transpose(1, 2)
    if using_references():
        return _written_out(q, k, v, mask, softcap, scale).transpose(1, 2)
    if softcap is None:
        return _sdpa(q, k, v, mask, False, scale).transpose(1, 2)
    return _softcapped(q, k, v, mask, softcap, scale).transpose(1, 2)


def cached_mask(query_positions: Tensor, slot_positions: Tensor, window: int | None) -> Tensor:
    """`[B, 1, S, slots]` bool: a query at position p sees a slot iff `0 <= position <= p`, within the window.

    query_positions `[B, S]` and slot_positions `[B, slots]`; -1 is padding. Padding queries see every slot:
    what comes out for them is never used, but it must not be NaN.
    """
    p, s = query_positions[:, None, :, None], slot_positions[:, None, None, :]
    seen = (s >= 0) & (s <= p)
    if window is not None:
        seen &= p - s < window
    return seen | (p < 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's attention on `[n, heads, L, D]`; grouped queries share keys and values."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # CUDA's masked kernel knows no grouped queries; without this torch falls back to the slow formula.
        repeat = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
    """Attention written out, for scores that go through tanh; softmax in float32."""
    n, heads, length, dim = q.shape
    groups = k.shape[1]
    folded = q.reshape(n, groups, heads // groups * length, dim)
    scores = (folded @ k.transpose(-1, -2)).view(n, heads, length, -1)
    scores = torch.tanh(scores * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
    return (weights.view(n, groups, -1, weights.shape[-1]) @ v).view(q.shape)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """What `attention` computes, by an explicit mask over all pairs of tokens, in float32 (or float64).

    segments `[B, S]` as `AttentionLayout.from_segments` takes them; None: each row is one document.
    """
    batch, length, _, dim = q.shape
    before = 0
    if prefix is not None:
        before = len(prefix[0])
        k, v = (torch.cat((p.expand(batch, -1, -1, -1), t), 1) for p, t in zip(prefix, (k, v), strict=True))
    seen = causal_band(window or before + length, length, before, q.device).expand(batch, -1, -1)
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    if segments is not None:
        # Query i of a document has index P + i: the window's rule goes by place in the document, and the
        # prefix stands right before its first token.
        same = segments[:, :, None] == segments[:, None, :]
        place = (same & causal_band(length, length, 0, q.device)).sum(-1) - 1
        distance = before + place[:, :, None] - torch.arange(before, device=q.device)
        seen = torch.cat((distance < (window or before + length), seen[:, :, before:] & same), 2)
        real = segments >= 0
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = _written_out(q, k, v, seen[:, None], softcap, scale).transpose(1, 2)
    return out * real[:, :, None, None]


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Attention on `[n, heads, L, D]` by its formula, in float32 (or float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.to(wide).repeat_interleave(repeat, 1), v.to(wide).repeat_interleave(repeat, 1)
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype)
