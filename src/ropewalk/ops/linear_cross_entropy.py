"""Cross-entropy of a linear output head without a [tokens, vocab] matrix, and the plain form beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.ops.cross_entropy_cpu import native_rows
from ropewalk.ops.head import VocabularyPart, by_blocks, capped, head_loss, plain_logits, uncap_, wide
from ropewalk.ops.native import on_gpu, takes
from ropewalk.ops.reference import using_references

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = 1024,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum over the scored rows of `cross_entropy(head(hidden), label)`: 0-d, float32 (float64 for float64).

    hidden [N, H], weight [V, H] and bias [V] have one dtype; labels [N] int64, -100 where a row is not
    scored (0.0 and zero gradients if none is), on any device: on the host, nothing waits for a GPU. The head
    is `hidden @ weight.T + bias`, then `softcap * tanh(x / softcap)`. `z_loss` adds `z_loss * logsumexp ** 2`
    per row (PaLM, arXiv 2204.02311).
    `chunk` is the most rows of logits held at once; fewer where they would pass 256 MiB (a GPU: 1 GiB).

    Logits are rounded to the inputs' dtype and the softmax is float32, as in transformers. In bfloat16 each
    chunk's part of the weight gradient is added in bfloat16: over 8 chunks it was measured 0.35% from the
    exact gradient; 0.24% with a float32 accumulator of V x H x 4 bytes; 0.17% is the last rounding alone. Of
    more than 32 chunks sums of some are added, in V x H numbers more: 0.5% over 512, 0.7% over 2,048.

    `part`: weight and bias hold some tokens only, and all processes that have the others compute this
    together. Each gets the whole loss, the gradient of its part, and its part's share of that of `hidden`.

    The graph can be walked backward once: its gradients are finished, scaled in place and given away. No
    double backward. Raises UserError for a label outside the vocabulary.
    """
    if using_references():
        return linear_cross_entropy_reference(
            hidden, weight, labels, bias=bias, softcap=softcap, z_loss=z_loss
        )
    vocabulary = weight.shape[0] if part is None else part.vocabulary
    index, targets = scored_rows(labels, vocabulary, hidden.device)

    def losses(place: slice, logits: Tensor, wanted: bool) -> Tensor:
        if part is not None:
            return _part_rows(logits, targets[place], softcap, z_loss, wanted, part)
        return cross_entropy_rows(logits, targets[place], softcap, z_loss, wanted)

    return head_loss(hidden, weight, bias, index, len(targets), chunk, losses)


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
    logits = plain_logits(hidden, weight, bias, softcap)
    labels = labels.to(logits.device)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()
    return loss


def scored_rows(labels: Tensor, vocab: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The indices of the scored rows (None: all of them) and their labels, on `device`.

    Counting them waits for the device that the labels are on.
    """
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
        return None, labels.to(device, non_blocking=True)
    index = torch.nonzero_static(scored, size=count).squeeze(1)
    return index.to(device, non_blocking=True), labels[index].to(device, non_blocking=True)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    z_loss: float,
    slopes: bool,
    factors: Tensor | None = None,
) -> Tensor:
    """Losses [c] of rows; `logits` [c, V] becomes their gradient where `slopes`, times `factors` [c]."""
    if on_gpu(logits):
        from ropewalk.ops.cross_entropy_kernel import run_kernel

        return run_kernel(logits, targets, softcap, z_loss, slopes, factors)
    if softcap is None and takes(logits):
        return native_rows(logits, targets, z_loss, slopes, factors)

    def block(some: slice, logits: Tensor, wanted: bool) -> Tensor:
        few = None if factors is None else factors[some]
        return _plain_rows(logits, targets[some], softcap, z_loss, wanted, few)

    return by_blocks(block, logits, slopes)


def _plain_rows(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    z_loss: float,
    slopes: bool,
    factors: Tensor | None,
) -> Tensor:
    x, tanh = capped(logits, softcap)
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
        if factors is not None:
            probability.mul_(factors.unsqueeze(1))
        logits.copy_(uncap_(probability, tanh))
    return loss.squeeze(1)


def _part_rows(
    logits: Tensor, targets: Tensor, softcap: float | None, z_loss: float, slopes: bool, part: VocabularyPart
) -> Tensor:
    """As `cross_entropy_rows`, of a part of the vocabulary: two exchanges of one or two numbers a row."""
    here = targets - part.start
    inside = (here >= 0) & (here < logits.shape[1])
    here = here.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    dtype = wide(logits.dtype)

    def most(_: slice, some: Tensor, __: bool) -> Tensor:
        return capped(some, softcap)[0].amax(1)

    high = part.largest(by_blocks(most, logits, False))

    def summed(place: slice, some: Tensor, _: bool) -> Tensor:
        x = capped(some, softcap)[0]
        own = torch.where(inside[place], x.gather(1, here[place]).squeeze(1), 0.0)
        return torch.stack(((x - high[place].unsqueeze(1)).exp_().sum(1), own), 1)

    total, own = part.total(by_blocks(summed, logits, False)).unbind(1)
    log_total = high + total.log()
    loss = log_total - own
    if z_loss:
        loss = loss + z_loss * log_total.square()
    if not slopes:
        return loss

    def bend(place: slice, some: Tensor, _: bool) -> Tensor:
        x, tanh = capped(some, softcap)
        pull = (1 + 2 * z_loss * log_total[place]).unsqueeze(1)
        probability = (x - log_total[place].unsqueeze(1)).exp_().mul_(pull)
        probability.scatter_add_(1, here[place], -inside[place].to(dtype).unsqueeze(1))
        some.copy_(uncap_(probability, tanh))
        return loss[place]

    return by_blocks(bend, logits, True)
