"""Divergence of a linear output head from a teacher's, for distillation, without a [tokens, vocab] matrix.

`linear_kl` has the teacher's own head; `linear_kl_top_k` only its likeliest tokens, as files may hold them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.ops.head import (
    HeadChunks,
    by_blocks,
    capped,
    head_loss,
    plain_logits,
    scored_index,
    uncap_,
    wide,
)
from ropewalk.ops.reference import using_references


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    scored: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Sum over the scored rows of KL(teacher || student): 0-d, float32 (float64 for float64).

    hidden [N, H], weight [V, H], teacher_hidden [N, G], teacher_weight [V, G], scored [N] bool. Each head is
    as in `linear_cross_entropy`; both logits, after their soft-caps, are divided by `temperature` (arXiv
    1503.02531; its factor temperature ** 2 on the loss is left to the caller). Gradients go to hidden, weight
    and bias, none to the teacher. They are made in the forward pass: the graph can be walked backward once.
    Raises UserError for heads of different vocabularies.
    """
    if weight.shape[0] != teacher_weight.shape[0]:
        sizes = f"{teacher_weight.shape[0]} tokens, the student of {weight.shape[0]}"
        raise UserError(f"the teacher has a vocabulary of {sizes}: distillation needs one tokenizer")
    if using_references():
        student, teacher = (
            (hidden, weight, bias, softcap),
            (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        )
        return linear_kl_reference(student, teacher, scored, temperature)
    index, count = scored_index(scored)
    given_hidden, given_weight = teacher_hidden.detach(), teacher_weight.detach()
    given_bias = None if teacher_bias is None else teacher_bias.detach()
    # two buffers of a chunk's logits; both heads go through the rows in the same chunks
    own_rows = HeadChunks(hidden, weight, None, None, count, chunk, 2).rows
    teachers = HeadChunks(given_hidden, given_weight, given_bias, index, count, own_rows, 2)
    chunks = iter(teachers)

    def losses(place: slice, logits: Tensor, wanted: bool) -> Tensor:
        *_, given = next(chunks)

        def block(some: slice, logits: Tensor, wanted: bool) -> Tensor:
            target = (capped(given[some], teacher_softcap)[0] / temperature).log_softmax(1)
            x, tanh = capped(logits, softcap)
            own = (x / temperature).log_softmax(1).to(target.dtype)
            p = target.exp()
            # where p is 0 its logarithm may be -inf, and 0 * inf is not 0
            result = torch.where(p > 0, p * (target - own), 0.0).sum(1)
            if wanted:
                logits.copy_(uncap_(own.exp_().sub_(p).div_(temperature), tanh))
            return result

        return by_blocks(block, logits, wanted)

    return head_loss(hidden, weight, bias, index, count, teachers.rows, losses, 2)


Head = tuple[Tensor, Tensor, Tensor | None, float | None]
"""hidden, weight, bias, softcap"""


def linear_kl_reference(student: Head, teacher: Head, scored: Tensor, temperature: float = 1.0) -> Tensor:
    """The same in plain PyTorch, with all logits at once."""
    given, own = ((plain_logits(*head)[scored] / temperature).log_softmax(-1) for head in (teacher, student))
    return F.kl_div(own, given.detach(), reduction="sum", log_target=True)


def linear_kl_top_k(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    scored: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Sum over the scored rows of KL(teacher || student) over k tokens and one bucket for all others: 0-d.

    indices [N, k] int64, no token twice in a row, and log_probs [N, k], the teacher's log-probabilities of
    them at this `temperature`; their probabilities sum to at most 1, what is left is the bucket's mass r:
    `sum_i p_i log(p_i / q_i) + r log(r / (1 - sum_i q_i))`. Merging tokens can only lower a divergence: it is
    a lower bound of the whole one, equal to it for k = V, and 0 where the student agrees with what is known.
    The rest is as in `linear_kl`.
    """
    if using_references():
        student = (hidden, weight, bias, softcap)
        return linear_kl_top_k_reference(student, indices, log_probs, scored, temperature)
    index, count = scored_index(scored)
    dtype = wide(hidden.dtype)

    def losses(place: slice, logits: Tensor, wanted: bool) -> Tensor:
        where = place if index is None else index[place]
        tokens, known = indices[where], log_probs[where].to(dtype)

        def block(some: slice, logits: Tensor, wanted: bool) -> Tensor:
            x, tanh = capped(logits, softcap)
            own = (x / temperature).log_softmax(1)
            result, rest, own_rest = _top_k_rows(own, tokens[some], known[some])
            if wanted:
                # q of a known token becomes q - p, of another one q * (1 - r / Q), Q their sum
                q = own.exp()
                slopes = q * (1 - (rest / own_rest.exp()).nan_to_num(0.0, 0.0)).unsqueeze(1)
                slopes.scatter_(1, tokens[some], q.gather(1, tokens[some]) - known[some].exp())
                logits.copy_(uncap_(slopes.div_(temperature), tanh))
            return result

        return by_blocks(block, logits, wanted)

    return head_loss(hidden, weight, bias, index, count, chunk, losses)


def linear_kl_top_k_reference(
    student: Head, indices: Tensor, log_probs: Tensor, scored: Tensor, temperature: float = 1.0
) -> Tensor:
    """The same in plain PyTorch, with all logits at once."""
    own = (plain_logits(*student)[scored] / temperature).log_softmax(-1)
    return _top_k_rows(own, indices[scored], log_probs[scored].to(own.dtype))[0].sum()


def _top_k_rows(own: Tensor, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log-probabilities `own` [c, V]: divergences; the teacher's mass of other tokens; log of our own."""
    p = known.exp()
    rest = (1 - p.sum(1)).clamp(min=0)
    own_rest = own.scatter(1, tokens, -torch.inf).logsumexp(1)
    rest = torch.where(own_rest > -torch.inf, rest, 0.0)  # k = V: there is no other token
    result = torch.where(p > 0, p * (known - own.gather(1, tokens)), 0.0).sum(1)
    safe = torch.where(rest > 0, own_rest, 0.0)
    return result + torch.xlogy(rest, rest) - rest * safe, rest, own_rest
