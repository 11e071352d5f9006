"""Attention of some queries over some keys, and how results over parts of the keys become the whole.

A document is a stretch of its row, so what a stretch of queries sees of an earlier stretch of keys is a
rectangle: nothing, everything, or (its own stretch, a window) a band. Each is a call of a kernel that also
gives the logarithm of its sum of exponentials, by which results are merged (as arXiv 2310.01889 and
2205.14135 do); with the merged sums the kernels' backward passes give each rectangle's share of the gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ropewalk.ops.attention_layout import AttentionLayout
from ropewalk.ops.product import float32_is_faster

_QUERY_BLOCK = 1024
"""Most queries whose mask or scores are held at once."""
Span = tuple[int, int]
"""Tokens of a row: the first, and the end."""


@dataclass(frozen=True)
class RowPart:
    """What of packed rows is here, where several processes share their tokens."""

    columns: Callable[[int], Tensor]
    """length of the rows -> which of their tokens are here, in order"""
    attention: Callable[..., Tensor]
    """`attention` of these tokens; its layout is that of the whole rows"""
    summed: Callable[[Tensor], Tensor]
    """the sum of everyone's tensors; a gradient goes to each of them"""


class Tile(NamedTuple):
    """Queries and keys, by their places in their tensors: query i sees key j iff `0 <= distance + i - j <
    window`, and each query sees at least one."""

    rows: slice
    queries: slice
    keys: slice
    distance: int
    """tokens from the first key to the first query"""


@dataclass(frozen=True)
class Scores:
    """How a score is made of q.k, and which count: as in `attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def tiles(
    layout: AttentionLayout,
    length: int,
    queries: Sequence[Span],
    keys: Sequence[Span],
    window: int | None,
    block: int | None,
) -> list[Tile]:
    """What `queries` see of `keys`, of rows of `length` tokens; both in the order of their tensors.

    A stretch of keys begins and ends outside each stretch of queries, or with it. `block`: most queries in a
    tile, beyond which a window or written-out scores would make it too large.
    """
    found: dict[tuple[Span, Span, int], list[int]] = {}
    for row, start, stop in layout.documents(length):
        for first, last, at in _placed(queries, start, stop):
            for low, high, there in _placed(keys, start, last):
                for borders in ((low, min(high, first)), (max(low, first), high)):
                    for a, b, c, d in _cut((first, last), borders, window, block):
                        place = (a + at, b + at), (c + there, d + there), a - c
                        found.setdefault(place, []).append(row)
    return [
        Tile(rows, slice(*q), slice(*k), distance)
        for (q, k, distance), members in found.items()
        for rows in _neighbours(members)
    ]


def _placed(spans: Sequence[Span], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What lies between `start` and `stop`: first, end, and what to add for the place in the tensor."""
    place = 0
    for first, last in spans:
        if max(first, start) < min(last, stop):
            yield max(first, start), min(last, stop), place - first
        place += last - first


def _cut(
    queries: Span, keys: Span, window: int | None, block: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of queries, each with just the keys that it sees."""
    if window is not None and queries[1] - keys[0] <= window:
        window = None
    size = queries[1] - queries[0]
    if window is not None:
        size = min(max(window, 128), _QUERY_BLOCK)
    size = min(size, block or size)
    for start in range(*queries, size):
        stop = min(start + size, queries[1])
        first, last = keys[0], min(keys[1], stop)
        if window is not None:
            first = max(first, start - window + 1)
            stop = min(stop, last + window - 1)  # those beyond see none of these keys
        if first < last and start < stop:
            yield start, stop, first, last


def _neighbours(rows: list[int]) -> Iterator[slice]:
    start = rows[0]
    for row, following in zip(rows, [*rows[1:], -1], strict=True):
        if following != row + 1:
            yield slice(start, row + 1)
            start = following


def block_of(q: Tensor, softcap: float | None) -> int | None:
    """The `block` of `tiles` for these queries: None where a kernel takes any number of them."""
    written_out = softcap is not None or not (q.device.type == "cpu" or _is_flash(q))
    return _QUERY_BLOCK if written_out else None


class PartialAttention:
    """Results for queries `[B, L, heads, D]` over the keys so far, in float32 (or float64)."""

    def __init__(self, q: Tensor, scores: Scores) -> None:
        self.q, self.scores = q.transpose(1, 2), scores
        wide = torch.promote_types(q.dtype, torch.float32)
        self.out = torch.zeros_like(self.q, dtype=wide)
        self.logsumexp = torch.full(self.q.shape[:3], -torch.inf, dtype=wide, device=q.device)

    def add(self, kv: Tensor, parts: Sequence[Tile]) -> None:
        """kv: keys and values, `[2, B, keys, kv_heads, D]`."""
        k, v = kv.transpose(2, 3)
        for tile in parts:
            some = self.q[tile.rows, :, tile.queries]
            some_k, some_v = k[tile.rows, :, tile.keys], v[tile.rows, :, tile.keys]
            out, logsumexp = _forward(some, some_k, some_v, tile.distance, self.scores)
            before, old = self.out[tile.rows, :, tile.queries], self.logsumexp[tile.rows, :, tile.queries]
            total = torch.logaddexp(old, logsumexp)
            before.mul_((old - total).exp().unsqueeze(-1))
            before.addcmul_(out.to(before.dtype), (logsumexp - total).exp().unsqueeze(-1))
            old.copy_(total)

    def result(self) -> Tensor:
        """As the queries; zeros where one sees nothing."""
        return self.out.transpose(1, 2).to(self.q.dtype)


class AttentionGradient:
    """Gradients of queries `[B, L, heads, D]`, and of the keys and values that they see."""

    def __init__(self, q: Tensor, out: Tensor, logsumexp: Tensor, grad: Tensor, scores: Scores) -> None:
        self.sources = [t.transpose(1, 2) for t in (grad, q, out)]
        self.logsumexp, self.scores = logsumexp, scores
        self.q = torch.zeros_like(self.sources[1], dtype=logsumexp.dtype)

    def of(self, kv: Tensor, parts: Sequence[Tile]) -> Tensor:
        """What these queries add to the gradient of `kv`: of its shape, in float32 (or float64)."""
        found = torch.zeros_like(kv, dtype=self.logsumexp.dtype)
        (k, v), (dk, dv) = kv.transpose(2, 3), found.transpose(2, 3)
        for tile in parts:
            grad, q, out = (t[tile.rows, :, tile.queries] for t in self.sources)
            some_k, some_v = k[tile.rows, :, tile.keys], v[tile.rows, :, tile.keys]
            logsumexp = self.logsumexp[tile.rows, :, tile.queries]
            parts_of = _backward(grad, q, some_k, some_v, out, logsumexp, tile.distance, self.scores)
            self.q[tile.rows, :, tile.queries] += parts_of[0]
            dk[tile.rows, :, tile.keys] += parts_of[1]
            dv[tile.rows, :, tile.keys] += parts_of[2]
        return found

    def queries(self) -> Tensor:
        return self.q.transpose(1, 2).to(self.sources[1].dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, distance: int, scores: Scores) -> tuple[Tensor, Tensor]:
    """A tile's result, as q `[n, heads, L, D]`, and logarithms of its sums; k and v `[n, kv_heads, K, D]`."""
    if scores.softcap is None and q.device.type == "cpu":
        causal, mask = _mask(q, k, distance, scores.window)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale)
        return out, logsumexp
    if _flash_takes(q, k, distance, scores):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        causal, options = _flash_options(q, k, distance, scores)
        flash = torch.ops.aten._flash_attention_forward
        out, logsumexp, *_ = flash(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, **options)
        return out.transpose(1, 2), logsumexp
    capped, seen = _written_out(q, k, distance, scores)
    logsumexp = capped.masked_fill(~seen, -torch.inf).logsumexp(-1)
    weights = (capped - logsumexp.unsqueeze(-1)).exp() * seen
    return (_folded(weights.to(v.dtype), v) @ v).view(q.shape), logsumexp


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    distance: int,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a tile's q, k and v, from the result over all keys and its sums."""
    if scores.softcap is None and q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and float32_is_faster():
            grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
        causal, mask = _mask(q, k, distance, scores.window)
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = differentiate(
            grad, q, k, v, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scores.scale
        )
        return dq, dk, dv
    if _flash_takes(q, k, distance, scores):
        grad, q, k, v, out = (t.transpose(1, 2).contiguous() for t in (grad, q, k, v, out))
        causal, options = _flash_options(q, k, distance, scores)
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)  # of dropout
        flash = torch.ops.aten._flash_attention_backward
        lengths = None, None, q.shape[1], k.shape[1]
        found = flash(grad, q, k, v, out, logsumexp.contiguous(), *lengths, 0.0, causal, *unused, **options)
        dq, dk, dv = (t.transpose(1, 2) for t in found)
        return dq, dk, dv
    capped, seen = _written_out(q, k, distance, scores)
    weights = (capped - logsumexp.unsqueeze(-1)).exp() * seen
    slopes = (_folded(grad, v) @ v.transpose(-1, -2)).view(weights.shape)
    slopes = weights * (slopes - (grad * out).sum(-1, dtype=weights.dtype, keepdim=True))
    if scores.softcap is not None:
        slopes *= 1 - (capped / scores.softcap).square()
    slopes = (slopes * scores.scale).to(q.dtype)
    dv = _folded(weights.to(q.dtype), v).transpose(-1, -2) @ _folded(grad, v)
    dk = _folded(slopes, k).transpose(-1, -2) @ _folded(q, k)
    return (_folded(slopes, k) @ k).view(q.shape), dk, dv


def _mask(q: Tensor, k: Tensor, distance: int, window: int | None) -> tuple[bool, Tensor | None]:
    """(causal, None) where the kernel's rule says what is seen, or a mask of 0 and -inf."""
    rows, columns = q.shape[2], k.shape[2]
    inside = window is None or distance + rows <= window
    if inside and distance >= columns - 1:
        return False, None
    if inside and distance == 0 and rows == columns:
        return True, None
    seen = _seen(q, k, distance, window)
    return False, torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)


def _seen(q: Tensor, k: Tensor, distance: int, window: int | None) -> Tensor:
    """`[L, K]` bool: the rule of `Tile`."""
    at = torch.arange(distance, distance + q.shape[2], device=q.device)[:, None]
    apart = at - torch.arange(k.shape[2], device=q.device)
    return (apart >= 0) & (apart < window) if window is not None else apart >= 0


def _written_out(q: Tensor, k: Tensor, distance: int, scores: Scores) -> tuple[Tensor, Tensor]:
    """Scores `[n, heads, L, K]` in float32 (or float64), and which count."""
    wide = torch.promote_types(q.dtype, torch.float32)
    values = (_folded(q, k) @ k.transpose(-1, -2)).to(wide).view(*q.shape[:3], -1) * scores.scale
    if scores.softcap is not None:
        values = torch.tanh(values / scores.softcap) * scores.softcap
    return values, _seen(q, k, distance, scores.window)


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """`[n, heads, L, .]` -> `[n, kv_heads, heads / kv_heads * L, .]`: queries that share keys together."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def _is_flash(q: Tensor) -> bool:
    """Whether CUDA's flash kernel takes such numbers."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _flash_takes(q: Tensor, k: Tensor, distance: int, scores: Scores) -> bool:
    """Whether it takes this tile; q and k `[n, heads, L, D]`.

    With a window it lets no query see more than K keys beyond the one it is aligned with, even where nothing
    is to bound them: the first of many queries would not see few keys before them all.
    """
    few = scores.window is not None and distance >= k.shape[2] - 1 and q.shape[2] > k.shape[2] + 1
    return scores.softcap is None and _is_flash(q) and not few


def _flash_options(
    q: Tensor, k: Tensor, distance: int, scores: Scores
) -> tuple[bool, dict[str, float | int]]:
    """Whether causal, and scale and window; q and k `[n, L, heads, D]`.

    The kernel aligns the last query with the last key; where it is causal here, that is so.
    """
    causal = distance < k.shape[1] - 1
    left = -1
    if scores.window is not None:
        left = scores.window - 1 - (distance + q.shape[1] - k.shape[1])
    return causal, {"scale": scores.scale, "window_size_left": left, "window_size_right": 0 if causal else -1}
