"""Attention by documents, in blocks of queries and over a cache equals the explicit formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.ops import AttentionLayout, attention, attention_cached, attention_reference, cached_mask
from ropewalk.ops.attention import Run


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def qkv(batch, length, heads=6, kv_heads=2, dim=8, dtype=torch.float32):
    return (
        random(batch, length, heads, dim, seed=1, dtype=dtype),
        random(batch, length, kv_heads, dim, seed=2, dtype=dtype),
        random(batch, length, kv_heads, dim, seed=3, dtype=dtype),
    )


def compare(inputs, out, expected, tolerance):
    """Results and, for a random loss, gradients; relative to the largest value."""

    def near(a, b):
        assert torch.isfinite(a).all()
        assert (a.float() - b.float()).abs().max() <= tolerance * max(1.0, b.float().abs().max().item())

    near(out, expected)
    weights = random(*out.shape, seed=9).detach()
    got = torch.autograd.grad((out.float() * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected.float() * weights).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        near(a, b)


def segments_of(rows: list[list[int]], length: int) -> torch.Tensor:
    """Each row: lengths of its documents; a negative number is padding; the rest of the row too."""
    result = torch.full((len(rows), length), -1)
    for i, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths):
            if n > 0:
                result[i, at : at + n] = number
            at += abs(n)
    return result


ROWS = [[5, 5, 7, 1, -2], [1, 1, 1], [20], [-4, 9, 3, 4]]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_explicit_formula(packed, window, softcap):
    inputs = qkv(4, 20)
    segments = segments_of(ROWS, 20) if packed else None
    layout = AttentionLayout.from_segments(segments) if packed else AttentionLayout.rows(4, 20)
    out = attention(*inputs, layout=layout, window=window, softcap=softcap, scale=0.3)
    expected = attention_reference(*inputs, segments, window, softcap, 0.3)
    compare(inputs, out, expected, 1e-5)
    if packed:
        assert (out[segments < 0] == 0).all()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("length", [33, 300])
def test_bfloat16_is_as_close_as_its_rounding(length, window):
    """Both the short documents, whose gradient is computed in float32, and the long ones."""
    inputs = qkv(1, length, 9, 3, 64, torch.bfloat16)
    segments = segments_of([[length // 3, length // 3]], length)
    out = attention(*inputs, layout=AttentionLayout.from_segments(segments), window=window)
    assert out.dtype == torch.bfloat16
    compare(inputs, out, attention_reference(*inputs, segments, window), 0.02)


@pytest.mark.parametrize(("window", "softcap"), [(1500, None), (70, None), (None, 5.0), (70, 5.0)])
def test_long_sequences_are_done_in_blocks_of_queries(window, softcap):
    """No mask and no scores of length squared; the seams do not show."""
    inputs = qkv(1, 2100, 2, 1, 4)
    layout = AttentionLayout.rows(1, 2100)
    out = attention(*inputs, layout=layout, window=window, softcap=softcap)
    compare(inputs, out, attention_reference(*inputs, None, window, softcap), 1e-5)
    assert max(band.shape[0] for band in layout.bands.values()) <= 1024
    if window is not None:
        assert max(band.shape[1] for band in layout.bands.values()) <= 1024 + window


def test_documents_do_not_see_each_other():
    q, k, v = (t.detach() for t in qkv(1, 12))
    layout = AttentionLayout.from_segments(segments_of([[5, 7]], 12))
    before = attention(q, k, v, layout=layout)
    k[:, :5] += 1.0
    v[:, :5] -= 1.0
    after = attention(q, k, v, layout=layout)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])


def test_nothing_is_seen_ahead_of_time():
    q, k, v = qkv(1, 9)
    out = attention(q, k, v, layout=AttentionLayout.rows(1, 9))
    (gradient,) = torch.autograd.grad(out[:, 4].sum(), v)
    assert (gradient[:, 5:] == 0).all()
    assert (gradient[:, :5] != 0).any(-1).all()


def test_neighbours_of_equal_length_run_together_and_rows_split_documents():
    layout = AttentionLayout.from_segments(segments_of([[4, 4, 4, 2], [3, 3, 2, -6], [-14]], 14))
    assert layout.runs == (
        Run(3, 4),
        Run(1, 2),
        Run(2, 3),
        Run(1, 2),
        Run(1, 20, padding=True),
    )
    equal_numbers = torch.zeros(2, 5, dtype=torch.int64)  # the same number in two rows is two documents
    assert AttentionLayout.from_segments(equal_numbers).runs == (Run(2, 5),)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 6).filter(bool), max_size=5), min_size=1, max_size=3))
def test_any_packing_covers_every_token_once(rows):
    segments = segments_of(rows, 40)
    layout = AttentionLayout.from_segments(segments)
    assert sum(run.tokens for run in layout.runs) == segments.numel()
    assert sum(run.tokens for run in layout.runs if not run.padding) == (segments >= 0).sum()
    inputs = tuple(t.detach() for t in qkv(len(rows), 40, 2, 1, 4))
    out = attention(*inputs, layout=layout)
    real = segments >= 0
    expected = attention_reference(*inputs, segments)
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (out[~real] == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_cached_queries_equal_the_last_rows_of_the_whole(window, softcap):
    q, k, v = (t.detach() for t in qkv(2, 10))
    whole = attention_reference(q, k, v, None, window, softcap)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    slots = torch.arange(10).expand(2, -1)
    for first in (0, 4, 9):
        mask = cached_mask(slots[:, first:], slots, window)
        got = attention_cached(q[:, first:], keys, values, mask=mask, softcap=softcap)
        torch.testing.assert_close(got, whole[:, first:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_in_a_cache_is_not_seen_and_gives_no_nan(softcap):
    q, k, v = (t.detach() for t in qkv(1, 6))
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3]])
    got = attention_cached(
        q, k.transpose(1, 2), v.transpose(1, 2), mask=cached_mask(positions, positions, None), softcap=softcap
    )
    assert got.isfinite().all()
    torch.testing.assert_close(
        got[:, 2:], attention_reference(q[:, 2:], k[:, 2:], v[:, 2:], softcap=softcap), atol=1e-5, rtol=1e-5
    )
