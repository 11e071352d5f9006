"""Cross-entropy of a linear output head without a [tokens, vocab] matrix, and the plain form beside it.

The head works on one chunk of rows at a time and its gradients are made in the forward pass, where the
chunk's logits still exist (the idea of Liger Kernel, arXiv 2410.10989, and of Cut Cross-Entropy, arXiv
2411.09009). Rows that are not scored never meet the head. Siblings that need other losses of the same
logits stand on `scored_rows`, `HeadChunks` and `HeadGradients`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.errors import UserError

IGNORED = -100
_CHUNK_BYTES = 256 << 20
# The softmax goes over a chunk in blocks, for its float32 copies: on a CPU 4 MB, which stay in the cache
# (half the time of whole chunks); elsewhere 64 MB.
_CPU_BLOCK = 1 << 20
_DEVICE_BLOCK = 1 << 24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> Tensor:
    """Sum over the scored rows of `cross_entropy(head(hidden), label)`: 0-d, float32 (float64 for float64).

    hidden [N, H], weight [V, H] and bias [V] have one dtype; labels [N] int64, -100 where a row is not
    scored (0.0 and zero gradients if none is). The head is `hidden @ weight.T + bias`, then
    `softcap * tanh(x / softcap)`. `z_loss` adds `z_loss * logsumexp ** 2` per row (PaLM, arXiv 2204.02311).
    `chunk` is the most rows of logits held at once; fewer where they would pass 256 MiB.

    Logits are rounded to the inputs' dtype and the softmax is float32, as in transformers. In bfloat16 each
    chunk's part of the weight gradient is added in bfloat16: over 8 chunks it was measured 0.35% from the
    exact gradient; 0.24% with a float32 accumulator of V x H x 4 bytes; 0.17% is the last rounding alone.

    The graph can be walked backward once: its gradients are finished, scaled in place and given away. No
    double backward. Raises UserError for a label outside the vocabulary.
    """
    index, targets = scored_rows(labels, weight.shape[0])
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _LinearCrossEntropy.apply(hidden, weight, bias, index, targets, softcap, z_loss, chunk, wanted)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> Tensor:
    """The same number in plain PyTorch, with all logits at once (`chunk` is not used)."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(_wide(logits.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()
    return loss


def scored_rows(labels: Tensor, vocab: int) -> tuple[Tensor | None, Tensor]:
    """The indices of the scored rows (None: all of them) and their labels; synchronises with the device."""
    scored = labels != IGNORED
    wrong = scored & ((labels < 0) | (labels >= vocab))
    count, errors = torch.stack((scored.sum(), wrong.sum())).tolist()
    if errors:
        row = int(wrong.nonzero()[0])
        raise UserError(
            f"label {int(labels[row])} in row {row} is outside the model's vocabulary of {vocab} tokens "
            f"(only {IGNORED} means: not scored); do the tokenizer and the model belong together?"
        )
    if count == labels.numel():
        return None, labels
    index = torch.nonzero_static(scored, size=count).squeeze(1)
    return index, labels[index]


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
    ) -> None:
        self.hidden, self.weight, self.bias, self.index, self.count = hidden, weight, bias, index, count
        fitting = _CHUNK_BYTES // (weight.shape[0] * weight.element_size())
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
                torch.mm(rows, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, rows, self.weight.t(), out=logits)
            yield place, where, rows, logits


class HeadGradients:
    """Gradients of the head's inputs, gathered chunk by chunk; None for those that are not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool], count: int
    ) -> None:
        self._weight, self._first = weight, True
        make = torch.empty_like if count == hidden.shape[0] and count else torch.zeros_like
        self.hidden = make(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        # the first chunk writes and the later ones add, so that the big one needs no zeros
        make = torch.empty_like if count else torch.zeros_like
        self.weight = make(weight) if needed[1] else None
        self.bias = None
        if needed[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=_wide(bias.dtype))

    def add(self, where: Tensor | slice, rows: Tensor, slopes: Tensor) -> None:
        """Adds a chunk: `slopes` [c, V] is the gradient of its logits, `rows` [c, H] its hidden states."""
        if self.hidden is not None:
            if isinstance(where, slice):
                torch.mm(slopes, self._weight, out=self.hidden[where])
            else:
                self.hidden.index_copy_(0, where, torch.mm(slopes, self._weight))
        if self.weight is not None:
            self.weight.addmm_(slopes.t(), rows, beta=0 if self._first else 1)
        if self.bias is not None:
            self.bias += slopes.sum(0, dtype=self.bias.dtype)
        self._first = False


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        z_loss: float,
        chunk: int,
        wanted: bool,
    ) -> Tensor:
        count = targets.shape[0]
        losses = hidden.new_empty(count, dtype=_wide(hidden.dtype))
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], count) if wanted else None
        block = max(1, (_CPU_BLOCK if hidden.device.type == "cpu" else _DEVICE_BLOCK) // weight.shape[0])
        for place, where, rows, logits in HeadChunks(hidden, weight, bias, index, count, chunk):
            for start in range(0, rows.shape[0], block):
                some = slice(start, start + block)
                losses[place][some] = _row_losses(
                    logits[some], targets[place][some], softcap, z_loss, slopes=wanted
                )
            if gradients is not None:
                gradients.add(where, rows, logits)
        if gradients is not None:
            ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients: HeadGradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("linear_cross_entropy: its graph can be walked backward once only")
        ctx.gradients = None
        finished = (gradients.hidden, gradients.weight, gradients.bias)
        return *(g if g is None else g.mul_(slope) for g in finished), None, None, None, None, None, None


def _row_losses(
    logits: Tensor, targets: Tensor, softcap: float | None, z_loss: float, slopes: bool
) -> Tensor:
    """Losses [c] of a few rows; `logits` [c, V] becomes their gradient where `slopes`."""
    x = logits.to(_wide(logits.dtype))
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        x = tanh * softcap
    target = targets.unsqueeze(1)
    probability = torch.softmax(x, 1)
    # the likeliest token's probability is at least 1/V: its logarithm is safe where the target's underflows
    log_total = x.amax(1, keepdim=True) - probability.amax(1, keepdim=True).log_()
    loss = log_total - x.gather(1, target)
    if z_loss:
        loss += z_loss * log_total.square()
        probability.mul_(1 + 2 * z_loss * log_total)
    if slopes:
        probability.scatter_add_(1, target, torch.full_like(loss, -1))
        if tanh is not None:
            probability.mul_(tanh.square_().neg_().add_(1))
        logits.copy_(probability)
    return loss.squeeze(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and softmaxes are done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
