"""Log-probabilities of given tokens under a linear output head, without a [tokens, vocab] matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.ops.head import HeadChunks, HeadGradients, plain_logits, wide
from ropewalk.ops.linear_cross_entropy import IGNORED, cross_entropy_rows, scored_rows
from ropewalk.ops.reference import using_references


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """`log_softmax(head(hidden))[label]` of each row: [N] float32 (float64 for float64), 0 where not scored.

    hidden [N, H], weight [V, H] and bias [V] have one dtype; labels [N] int64, -100 where a row is not
    scored. The head and `chunk` are as in `linear_cross_entropy`. What losses of whole answers stand on (DPO,
    GRPO): any gradient may come back for each row, so the logits are computed again, chunk by chunk, in the
    backward pass. No double backward. Raises UserError for a label outside the vocabulary.
    """
    if using_references():
        return linear_logprobs_reference(hidden, weight, labels, bias=bias, softcap=softcap)
    index, targets = scored_rows(labels, weight.shape[0], hidden.device)
    return _LinearLogprobs.apply(hidden, weight, bias, index, targets, softcap, chunk)


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same in plain PyTorch, with all logits at once."""
    logits = plain_logits(hidden, weight, bias, softcap)
    return -F.cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="none")


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, index, targets)
        ctx.softcap, ctx.chunk = softcap, chunk
        count = len(targets)
        losses = hidden.new_empty(count, dtype=wide(hidden.dtype))
        for place, _, _, logits in HeadChunks(hidden, weight, bias, index, count, chunk):
            losses[place] = cross_entropy_rows(logits, targets[place], softcap, 0.0, slopes=False)
        if index is None:
            return losses.neg_()
        return losses.new_zeros(len(hidden)).index_copy_(0, index, losses.neg_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, targets = ctx.saved_tensors
        factors = -(slope if index is None else slope[index])  # those of the negated log-probabilities
        chunks = HeadChunks(hidden, weight, bias, index, len(targets), ctx.chunk)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], chunks)
        for place, where, rows, logits in chunks:
            cross_entropy_rows(logits, targets[place], ctx.softcap, 0.0, slopes=True, factors=factors[place])
            gradients.add(where, rows, logits)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None
