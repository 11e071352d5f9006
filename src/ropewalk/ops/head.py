"""The core of every loss of a linear output head: logits of a chunk of rows at a time, never [tokens, vocab].

Gradients of the head's inputs are made where a chunk's logits still exist (the idea of Liger Kernel, arXiv
2410.10989, and of Cut Cross-Entropy, arXiv 2411.09009). Rows that are not scored never meet the head.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.ops.native import on_gpu
from ropewalk.ops.product import multiply

_CHUNK_BYTES = 256 << 20
_DEVICE_CHUNK_BYTES = 1 << 30  # elsewhere: the weight's gradient is read and written once a chunk
SEVERAL = 32
"""Chunks whose parts of a weight's gradient are added in 16 bits one after the other. Of more, sums of some
are added: one by one the gradient of 512 chunks was 5% off, of 2,048 38%."""
# Plain softmaxes go over a chunk in blocks, for their float32 copies: on a CPU 4 MB, which stay in the cache
# (half the time of whole chunks); elsewhere 64 MB.
_CPU_BLOCK = 1 << 20
_DEVICE_BLOCK = 1 << 24

Losses = Callable[[slice, Tensor, bool], Tensor]
"""(place, logits [c, V] of that place, wanted) -> losses [c]; where wanted, the logits become their gradient.
The place is that of a chunk among the scored rows, or of a block in its chunk."""


@dataclass(frozen=True)
class VocabularyPart:
    """The head's weight holds some rows of the whole, and other processes have the others."""

    start: int
    """the first token that is here"""
    vocabulary: int
    """tokens in all"""
    total: Callable[[Tensor], Tensor]
    """the sum of everyone's tensors"""
    largest: Callable[[Tensor], Tensor]
    """their largest numbers"""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    count: int,
    chunk: int,
    losses: Losses,
    buffers: int = 1,
) -> Tensor:
    """Sum of `losses` over the `count` scored rows, at `index` (None: all): 0-d, in the dtype of `wide`.

    The gradients are made in the forward pass, so that the graph can be walked backward once; no double
    backward.
    """
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _HeadLoss.apply(hidden, weight, bias, index, count, chunk, losses, buffers, wanted)


def by_blocks(losses: Losses, logits: Tensor, wanted: bool) -> Tensor:
    """`losses` of a chunk, in such blocks of its rows that float32 copies of a block's logits are small."""
    rows, vocab = logits.shape
    size = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _DEVICE_BLOCK) // vocab)
    places = (slice(start, min(start + size, rows)) for start in range(0, rows, size))
    return torch.cat([losses(place, logits[place], wanted) for place in places])


class HeadChunks:
    """Logits of the scored rows, a chunk at a time, all in one buffer that the next chunk overwrites."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        count: int,
        chunk: int,
        buffers: int = 1,
    ) -> None:
        """`buffers`: how many of its size the caller will hold at once; together they stay within 256 MiB on
        a CPU, and 1 GiB elsewhere."""
        self.hidden, self.weight, self.bias, self.index, self.count = hidden, weight, bias, index, count
        most = _CHUNK_BYTES if weight.device.type == "cpu" else _DEVICE_CHUNK_BYTES
        fitting = most // (buffers * weight.shape[0] * weight.element_size())
        if fitting > 128:
            fitting -= fitting % 128  # whole tiles of a GPU's products
        self.rows = max(1, min(chunk, fitting, count))

    def __iter__(self) -> Iterator[tuple[slice, Tensor | slice, Tensor, Tensor]]:
        """Yields (place among the scored rows, place in `hidden`, hidden [c, H], logits [c, V], uncapped)."""
        if self.count == 0:
            return
        buffer = self.hidden.new_empty(self.rows, self.weight.shape[0])
        for start in range(0, self.count, self.rows):
            place = slice(start, min(start + self.rows, self.count))
            where = place if self.index is None else self.index[place]
            rows = self.hidden[where]
            logits = buffer[: rows.shape[0]]
            if self.bias is None:
                multiply(rows, self.weight.t(), logits)
            else:
                torch.addmm(self.bias, rows, self.weight.t(), out=logits)
            yield place, where, rows, logits


class HeadGradients:
    """Gradients of the head's inputs, gathered chunk by chunk; None for those that are not needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, bool, bool],
        chunks: HeadChunks,
    ) -> None:
        count = chunks.count
        self._weight, self._done = weight, 0
        self._part: Tensor | None = None
        self._chunks = -(-count // chunks.rows)
        divided = weight.element_size() == 2 and self._chunks > SEVERAL
        self._group = math.isqrt(self._chunks) + 1 if divided else max(1, self._chunks)
        make = torch.empty_like if count == hidden.shape[0] and count else torch.zeros_like
        self.hidden = make(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        # the first chunk writes and the later ones add, so that the big one needs no zeros
        make = torch.empty_like if count else torch.zeros_like
        self.weight = make(weight) if needed[1] else None
        self.bias = None
        if needed[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=wide(bias.dtype))

    def add(self, where: Tensor | slice, rows: Tensor, slopes: Tensor) -> None:
        """Adds a chunk: `slopes` [c, V] is the gradient of its logits, `rows` [c, H] its hidden states."""
        if self.hidden is not None:
            if isinstance(where, slice):
                multiply(slopes, self._weight, self.hidden[where])
            else:
                self.hidden.index_copy_(0, where, multiply(slopes, self._weight, torch.empty_like(rows)))
        if self.weight is not None:
            self._add_weight(slopes.t(), rows)
        if self.bias is not None:
            self.bias += slopes.sum(0, dtype=self.bias.dtype)

    def _add_weight(self, slopes: Tensor, rows: Tensor) -> None:
        assert self.weight is not None
        place, self._done = self._done % self._group, self._done + 1
        if self._done <= self._group:
            multiply(slopes, rows, self.weight, add=place > 0)
            return
        if self._part is None:
            self._part = torch.empty_like(self.weight)
        multiply(slopes, rows, self._part, add=place > 0)
        if place == self._group - 1 or self._done == self._chunks:
            self.weight += self._part
        if self._done == self._chunks:
            self._part = None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        count: int,
        chunk: int,
        losses: Losses,
        buffers: int,
        wanted: bool,
    ) -> Tensor:
        total = hidden.new_empty(count, dtype=wide(hidden.dtype))
        chunks = HeadChunks(hidden, weight, bias, index, count, chunk, buffers)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], chunks) if wanted else None
        for place, where, rows, logits in chunks:
            total[place] = losses(place, logits, wanted)
            if gradients is not None:
                gradients.add(where, rows, logits)
        if gradients is not None:
            ctx.gradients = gradients
        return total.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients: HeadGradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the graph of this loss can be walked backward once only")
        ctx.gradients = None
        finished = (gradients.hidden, gradients.weight, gradients.bias)
        return *(g if g is None else _scale(g, slope) for g in finished), None, None, None, None, None, None


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    if on_gpu(gradient) and gradient.is_contiguous():
        from ropewalk.ops.elementwise_kernel import scale_

        return scale_(gradient, factor)
    return gradient.mul_(factor)


def capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in float32 (or float64) after the soft-cap, and its tanh, which `uncap_` wants."""
    x = logits.to(wide(logits.dtype))
    if softcap is None:
        return x, None
    tanh = torch.tanh(x / softcap)
    return tanh * softcap, tanh


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """All logits at once, in float32 (or float64) after the soft-cap: what the references start from."""
    return capped(F.linear(hidden, weight, bias), softcap)[0]


def scored_index(scored: Tensor) -> tuple[Tensor | None, int]:
    """Where a [N] bool is true (None: everywhere), and how often; synchronises with the device."""
    count = int(scored.sum())
    if count == len(scored):
        return None, count
    return torch.nonzero_static(scored, size=count).squeeze(1), count


def uncap_(slopes: Tensor, tanh: Tensor | None) -> Tensor:
    """The gradient before the soft-cap, of the gradient after it; in place, and tanh is used up."""
    return slopes if tanh is None else slopes.mul_(tanh.square_().neg_().add_(1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and softmaxes are done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
