"""From logits `[B, V]` to one token per row: the usual filters, as Hugging Face defines and orders them.

Each filter is a pure function over all rows; a token that is out gets -inf. The draw takes its random
numbers as an argument, so what a row gets does not depend on which rows happen to be beside it.
"""

import math
from dataclasses import dataclass

import torch

from ropewalk.errors import UserError

NUCLEUS_GUESS = 512
"""Tokens among which a nucleus is looked for before the whole vocabulary is sorted (which is slow)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy, a filter at None is off. UserError out of range."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}")


def choose(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None, uniform: torch.Tensor | None
) -> torch.Tensor:
    """Token ids `[B]` for float32 `logits` `[B, V]`.

    `seen` (bool `[B, V]`: tokens of the prompt and the answer so far) is needed for the repetition
    penalty, `uniform` (float64 `[B]` in [0, 1)) where temperature is above 0. Order of the filters:
    repetition penalty, temperature, top-k, top-p, min-p.
    """
    if sampling.repetition_penalty is not None and seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0 or uniform is None:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return draw(logits, uniform)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Positive logits of `seen` tokens divided by `penalty`, negative ones times it (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` largest of each row, and what equals the smallest of them."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The smallest set of each row's likeliest tokens whose probability reaches `p` (arXiv 1904.09751).

    What equals the least likely of them stays too.
    """
    if p == 1:
        return logits
    total = logits.logsumexp(-1, keepdim=True)
    guess = min(NUCLEUS_GUESS, logits.shape[-1])
    while True:
        best = logits.topk(guess).values
        mass = (best - total).exp().cumsum(-1)
        if guess == logits.shape[-1] or bool((mass[:, -1] >= p).all()):
            break
        guess = logits.shape[-1]
    # A token stays while the mass *before* it has not reached p; the first always does.
    size = (mass[:, :-1] < p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < best.gather(-1, size), -math.inf)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens at least `p` times as likely as the row's likeliest (arXiv 2407.01082)."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row by inversion: the first whose cumulative probability exceeds `uniform` `[B]`."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
