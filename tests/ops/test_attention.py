"""Attention by documents, in blocks of queries and over a cache equals the explicit formula."""

import gc
import weakref
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from ropewalk.ops import (
    AttentionLayout,
    attention,
    attention_cached,
    attention_reference,
    cached_mask,
    references,
)
from ropewalk.ops.attention_layout import Run


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
    """Short documents and long ones."""
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
    if window is not None:
        assert all(band.shape[0] <= 1024 for band in layout.bands.values())
        assert all(band.shape[1] <= 1024 + window for band in layout.bands.values())
    else:
        assert not layout.bands  # as many as blocks, each as long as the row


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, None), (None, 5.0), (300, 5.0)])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_long_rows_keep_nothing_of_length_squared(with_prefix, window, softcap):
    """What waits for the backward pass grows with the length, not its square."""

    def kept(length):
        inputs = qkv(1, length, 2, 1, 4)
        prefix = qkv(1, 8, 2, 1, 4)[1:]
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attention(
                *inputs,
                layout=AttentionLayout.rows(1, length),
                window=window,
                softcap=softcap,
                prefix=(prefix[0][0], prefix[1][0]) if with_prefix else None,
            )
        return sum(sizes.values())

    assert kept(4096) <= 2.5 * kept(2048)


@pytest.mark.parametrize(("window", "softcap"), [(64, 5.0), (None, 5.0), (64, None)])
def test_a_checkpoint_around_long_rows_frees_what_it_computes_again(window, softcap):
    """Soft-capped blocks of queries are checkpoints of their own: they must not hold its tensors."""
    x = random(1, 1100, 2 * 8)
    freed = []

    def block(x):
        made = [x * factor for factor in (1.0, 2.0, 3.0)]
        freed.extend(map(weakref.ref, made))
        q, k, v = (t.view(1, 1100, 2, 8) for t in made)
        layout = AttentionLayout.rows(1, 1100)
        return attention(q, k, v, layout=layout, window=window, softcap=softcap)

    out = checkpoint(block, x, use_reentrant=False)
    gc.collect()
    assert [t() is None for t in freed] == [True] * 3
    out.sum().backward()
    assert x.grad is not None


def with_prefix(length=5, kv_heads=2, dim=8, dtype=torch.float32):
    return random(length, kv_heads, dim, seed=4, dtype=dtype), random(
        length, kv_heads, dim, seed=5, dtype=dtype
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_a_prefix_stands_before_every_document(packed, window, softcap):
    """Against the explicit formula, and that against documents one by one; gradients reach the prefix."""
    inputs, prefix = qkv(4, 20, dtype=torch.float64), with_prefix(dtype=torch.float64)
    segments = segments_of(ROWS, 20) if packed else torch.zeros(4, 20, dtype=torch.int64)
    layout = AttentionLayout.from_segments(segments)
    options = {"window": window, "softcap": softcap, "scale": 0.3, "prefix": prefix}
    out = attention(*inputs, layout=layout, **options)
    expected = attention_reference(*inputs, segments, **options)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves, slope = (*inputs, *prefix), random(*out.shape, seed=9, dtype=torch.float64)
    # with a window of 1 the prefix is not in the graph at all
    got, wanted = (
        torch.autograd.grad(o, leaves, slope, True, materialize_grads=True) for o in (out, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for row in range(4):
        for number in range(int(segments[row].max()) + 1):
            q, k, v = (t[row][segments[row] == number] for t in inputs)
            keys, values = torch.cat((prefix[0], k))[None], torch.cat((prefix[1], v))[None]
            queries = torch.cat((torch.zeros(5, 6, 8, dtype=torch.float64), q))[None]
            alone = attention_reference(queries, keys, values, None, window, softcap, 0.3)[0, 5:]
            torch.testing.assert_close(expected[row][segments[row] == number], alone)


@pytest.mark.parametrize("window", [None, 40, 1100])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_prefix_before_a_long_document(window, softcap):
    inputs, prefix = qkv(1, 1100, 2, 1, 4), with_prefix(30, 1, 4)
    out = attention(
        *inputs, layout=AttentionLayout.rows(1, 1100), window=window, softcap=softcap, prefix=prefix
    )
    expected = attention_reference(*inputs, None, window, softcap, None, prefix)
    compare((*inputs, *prefix), out, expected, 1e-5)


@pytest.mark.parametrize("length", [33, 300])
def test_a_prefix_in_bfloat16_is_as_close_as_its_rounding(length):
    inputs = qkv(2, length, 9, 3, 64, torch.bfloat16)
    prefix = with_prefix(7, 3, 64, torch.bfloat16)
    segments = segments_of([[length // 3, length // 3, 10], [length - 4]], length)
    out = attention(*inputs, layout=AttentionLayout.from_segments(segments), prefix=prefix)
    assert out.dtype == torch.bfloat16
    expected = attention_reference(*inputs, segments, prefix=prefix)
    compare((*inputs, *prefix), out, expected, 0.02)


def test_references_replace_both_kinds_of_attention():
    inputs, prefix = qkv(4, 20, dtype=torch.bfloat16), with_prefix(dtype=torch.bfloat16)
    segments = segments_of(ROWS, 20)
    layout = AttentionLayout.from_segments(segments)
    with references():
        out = attention(*inputs, layout=layout, window=4, softcap=3.0, prefix=prefix)
        assert torch.equal(out, attention_reference(*inputs, segments, 4, 3.0, None, prefix))
        q, k, v = (t.detach() for t in qkv(2, 10))
        slots = torch.arange(10).expand(2, -1)
        mask = cached_mask(slots[:, 4:], slots, 3)
        cached = attention_cached(q[:, 4:], k.transpose(1, 2), v.transpose(1, 2), mask=mask)
    torch.testing.assert_close(cached, attention_reference(q, k, v, None, 3)[:, 4:])


def packed_by_hand(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What torch documents of varlen_attn: causal from the end of each document, a window to the left."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert window_size[1] == 0
    assert starts_q.dtype == starts_k.dtype == torch.int32
    pieces = []
    for i in range(len(starts_q) - 1):
        dq, dk, dv = q[starts_q[i] : starts_q[i + 1]], *(t[starts_k[i] : starts_k[i + 1]] for t in (k, v))
        assert len(dq) <= longest_q
        assert len(dk) <= longest_k
        dk, dv = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (dk, dv))
        distance = torch.arange(len(dq))[:, None] + len(dk) - len(dq) - torch.arange(len(dk))
        seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else distance >= 0)
        scores = torch.einsum("qhd,khd->hqk", dq, dk) * scale
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), dv))
    return torch.cat(pieces)


@pytest.mark.parametrize("prefix", [None, with_prefix()])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_what_the_cuda_kernel_is_given(monkeypatch, window, prefix):
    """Its documented formula in its place, for want of a GPU: documents, windows and prefixes add up."""
    from torch.nn.attention import varlen

    module = import_module("ropewalk.ops.attention")
    monkeypatch.setattr(varlen, "varlen_attn", packed_by_hand)
    monkeypatch.setattr(module, "_is_packed", lambda *_: True)
    inputs, segments = qkv(4, 20), segments_of(ROWS, 20)
    layout = AttentionLayout.from_segments(segments)
    out = attention(*inputs, layout=layout, window=window, scale=0.3, prefix=prefix)
    assert (out[segments < 0] == 0).all()
    expected = attention_reference(*inputs, segments, window, None, 0.3, prefix)
    compare((*inputs, *(prefix or ())), out, expected, 1e-5)
    assert list(layout.packings) == [5 if prefix else 0]  # made once


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_the_cuda_kernel(window, prefix):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: varlen_attn runs on no other")
    before = with_prefix(7, 3, 64, torch.bfloat16) if prefix else ()
    inputs = tuple(
        t.detach().cuda().requires_grad_() for t in (*qkv(2, 300, 9, 3, 64, torch.bfloat16), *before)
    )
    segments = segments_of([[100, 100, 10], [296]], 300).cuda()
    layout = AttentionLayout.from_segments(segments)
    options = {"window": window, "prefix": inputs[3:] or None}
    out = attention(*inputs[:3], layout=layout, **options)
    assert layout.packings
    expected = attention_reference(*inputs[:3], segments, **options)
    compare([t for t in inputs], out.cpu(), expected.cpu(), 0.02)


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
