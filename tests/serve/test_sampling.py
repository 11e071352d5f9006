"""The filters are those of transformers; the draw follows the distribution; the guess at top-p is exact."""

import pytest
import torch
from transformers.generation import logits_process as reference

from ropewalk.errors import UserError
from ropewalk.serve import sampling
from ropewalk.serve.sampling import Sampling, choose


def _logits(rows: int = 5, vocabulary: int = 97, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("k", [1, 7, 97, 500])
def test_top_k_is_that_of_transformers(k):
    x = _logits()
    assert torch.equal(sampling.keep_top_k(x, k), reference.TopKLogitsWarper(k)(None, x))


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("p", [1e-4, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("guess", [1, 8, 512])
def test_top_p_is_that_of_transformers(p, scale, guess, monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS_GUESS", guess)
    x = _logits(scale=scale)
    assert torch.equal(sampling.keep_top_p(x, p), reference.TopPLogitsWarper(p)(None, x))


def test_top_p_after_top_k_ignores_what_is_out():
    x = sampling.keep_top_k(_logits(), 5)
    assert torch.equal(sampling.keep_top_p(x, 0.8), reference.TopPLogitsWarper(0.8)(None, x))


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_is_that_of_transformers(p):
    x = _logits()
    assert torch.equal(sampling.keep_min_p(x, p), reference.MinPLogitsWarper(p)(None, x))


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    x = _logits()
    ids = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 97, dtype=torch.bool).scatter_(1, ids, True)
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(ids, x.clone())
    assert torch.equal(sampling.penalize_repetition(x, seen, penalty), expected)


def test_all_filters_together_leave_the_tokens_that_transformers_leaves():
    x = _logits(64)
    ids = torch.randint(0, 97, (64, 4), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(64, 97, dtype=torch.bool).scatter_(1, ids, True)
    chain = reference.LogitsProcessorList(
        [
            reference.RepetitionPenaltyLogitsProcessor(1.5),
            reference.TemperatureLogitsWarper(1.7),
            reference.TopKLogitsWarper(20),
            reference.TopPLogitsWarper(0.9),
            reference.MinPLogitsWarper(0.1),
        ]
    )
    allowed = chain(ids, x.clone()).isfinite()
    chosen = torch.zeros_like(allowed)
    how = Sampling(temperature=1.7, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    for u in torch.linspace(0, 1 - 1e-12, 4000, dtype=torch.float64):
        chosen.scatter_(1, choose(x, how, seen, u.expand(64)).unsqueeze(1), True)
    assert not (chosen & ~allowed).any()
    assert (chosen == allowed).float().mean() > 0.999  # 4,000 even draws meet all but vanishing tokens


def test_temperature_zero_is_greedy_and_needs_no_random_number():
    x = _logits()
    assert torch.equal(choose(x, Sampling(top_k=3, top_p=0.1), None, None), x.argmax(-1))


def test_draws_follow_the_softmax():
    x = _logits(1, 11, 1.0)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = choose(x.expand(20_000, -1), Sampling(temperature=0.7), None, u)
    share = torch.bincount(drawn, minlength=11) / 20_000
    torch.testing.assert_close(share, (x[0] / 0.7).softmax(-1), atol=1e-4, rtol=0)


def test_a_token_that_is_out_is_never_drawn_at_the_ends_of_the_range():
    x = torch.full((2, 6), -torch.inf)
    x[:, 3] = 0.0
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampling.draw(x, u).tolist() == [3, 3]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
