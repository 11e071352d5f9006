"""Causal attention over packed rows, and over a key-value cache.

A packed row costs what its documents cost: attention runs document by document, neighbours of equal length
together, and nothing masks one document from another. Keys and values are never repeated for grouped queries.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 1024
"""Most queries whose mask or scores are held at once."""
_SHORT = 256
"""Longest document whose bfloat16 gradient the CPU computes faster in float32."""


@dataclass(frozen=True)
class Run:
    """`count` neighbouring documents of `length` tokens each; or padding."""

    count: int
    length: int
    padding: bool = False

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass
class AttentionLayout:
    """Where documents begin and end in the flattened `[B * S]` tokens of a batch. Built once per forward."""

    runs: tuple[Run, ...]
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Masks of sliding windows, shared by the layers."""

    @classmethod
    def rows(cls, batch: int, length: int) -> "AttentionLayout":
        """Each row is one document."""
        return cls((Run(batch, length),))

    @classmethod
    def from_segments(cls, segments: Tensor) -> "AttentionLayout":
        """segments `[B, S]` integers: tokens of a document share a number, neighbours differ, -1 is padding.

        Copies segments to the host if they are not there.
        """
        rows = segments.cpu()
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
        first = starts.flatten().nonzero().flatten()
        lengths = torch.diff(first, append=torch.tensor([rows.numel()])).tolist()
        paddings = (rows.flatten()[first] < 0).tolist()
        runs: list[Run] = []
        for length, padding in zip(lengths, paddings, strict=True):
            last = runs[-1] if runs else None
            if last is not None and padding and last.padding:
                runs[-1] = Run(1, last.tokens + length, True)
            elif last is not None and not padding and not last.padding and last.length == length:
                runs[-1] = Run(last.count + 1, length)
            else:
                runs.append(Run(1, length, padding))
        return cls(tuple(runs))

    def band(self, window: int, queries: int, before: int, device: torch.device) -> Tensor:
        """`[queries, before + queries]`: query i sees the keys up to `before + i`, `window` of them."""
        key = (window, queries, before)
        if key not in self.bands:
            distance = (
                torch.arange(before, before + queries, device=device)[:, None]
                - torch.arange(before + queries, device=device)[None, :]
            )
            self.bands[key] = (distance >= 0) & (distance < window)
        return self.bands[key]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: AttentionLayout,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within each document.

    q is `[B, S, heads, D]`, k and v `[B, S, kv_heads, D]`, kv_heads a divisor of heads; the result is as q.
    `window`: keys a query sees, itself included. `softcap` c: scores become `c * tanh(score / c)` (gemma2).
    `scale`: factor on q.k, by default `D ** -0.5`. Padding gives zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if len(layout.runs) == 1 and not layout.runs[0].padding:
        run = layout.runs[0]
        dq, dk, dv = (t.reshape(run.count, run.length, *t.shape[2:]) for t in (q, k, v))
        return _documents(dq, dk, dv, layout, window, softcap, scale).reshape(q.shape)
    # One split for each input, so that its backward pass is one concatenation.
    sizes = [run.tokens for run in layout.runs]
    pieces = zip(*(t.flatten(0, 1).split(sizes) for t in (q, k, v)), strict=True)
    outputs = []
    for run, piece in zip(layout.runs, pieces, strict=True):
        if run.padding:
            outputs.append(torch.zeros_like(piece[0]))
            continue
        dq, dk, dv = (t.unflatten(0, (run.count, run.length)) for t in piece)
        outputs.append(_documents(dq, dk, dv, layout, window, softcap, scale).flatten(0, 1))
    return torch.cat(outputs).view(q.shape)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Documents of equal length: q `[n, L, heads, D]`, k and v `[n, L, kv_heads, D]` -> as q."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length = q.shape[2]
    window = None if window is None or window >= length else window
    if window is None and softcap is None:
        trained_on_cpu = q.device.type == "cpu" and torch.is_grad_enabled()
        if trained_on_cpu and q.dtype == torch.bfloat16 and length <= _SHORT:
            return _ShortCausal.apply(q, k, v, scale).transpose(1, 2)
        return _sdpa(q, k, v, None, True, scale).transpose(1, 2)
    # Blocks of queries with just the keys they see: memory grows with the window, not with length squared.
    block = _QUERY_BLOCK if window is None else min(max(window, 128), _QUERY_BLOCK)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        mask = layout.band(window or length, stop - start, start - first, q.device)
        part = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        if softcap is None:
            outputs.append(_sdpa(*part, mask, False, scale))
        else:
            outputs.append(_softcapped(*part, mask, softcap, scale))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)).transpose(1, 2)


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
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights.view(n, groups, -1, weights.shape[-1]) @ v).view(q.shape)


class _ShortCausal(torch.autograd.Function):
    """Causal attention of short documents on a CPU: forward in bfloat16, gradient in float32.

    The CPU kernel's bfloat16 backward repacks its operands block by block: for documents of 32 to 128 tokens
    it takes 3 to 5 times as long as the float32 one, casts included.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        inputs = [t.float() for t in (grad, q, k, v, out)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, logsumexp, 0.0, True, scale=ctx.scale
        )
        dq, dk, dv = (g.to(q.dtype) for g in grads)
        return dq, dk, dv, None


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `attention` computes, by an explicit mask over all pairs of tokens, in float32."""
    batch, length, heads, dim = q.shape
    repeat = heads // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    seen = seen.to(q.device).expand(batch, length, length)
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
        real = segments >= 0
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.float())
    return (out * real[:, :, None, None]).to(q.dtype)
