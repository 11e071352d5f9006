"""The CPU's own kernel for packed documents equals the explicit formula, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.ops import AttentionLayout, attention, attention_reference
from ropewalk.ops.attention_cpu import possible

pytestmark = pytest.mark.skipif(not possible(), reason="no AVX-512 here, or no C++ compiler")
BFLOAT16 = 2.0**-8


def inputs(length, heads=4, kv_heads=2, dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in sizes]


def results(documents, q, k, v, grad, window=None, scale=None, softcap=None):
    """The result and its three gradients; a negative document is padding."""
    segments = torch.cat([torch.full((abs(n),), i if n > 0 else -1) for i, n in enumerate(documents)])[None]
    layout = AttentionLayout.from_segments(segments)
    out = attention(q, k, v, layout=layout, window=window, scale=scale, softcap=softcap)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*exact, segments, window, softcap, scale)
    found = out, *torch.autograd.grad(out, (q, k, v), grad)
    return found, (expected, *torch.autograd.grad(expected, exact, grad.double())), segments


@given(
    documents=st.lists(st.integers(1, 150).flatmap(lambda n: st.sampled_from([n, n, n, -n])), max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (9, 3), (8, 1)]),
    dim=st.sampled_from([8, 20, 32, 64, 80, 128, 160]),
    window=st.one_of(st.none(), st.integers(2, 200)),
    scale=st.one_of(st.none(), st.floats(0.01, 0.4)),
    softcap=st.sampled_from([None, None, 2.0, 50.0]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_explicit_formula(documents, heads, dim, window, scale, softcap):
    """Any lengths, heads, dimensions and windows; padding gives zeros and takes none."""
    documents = [*documents, 37]
    q, k, v, grad = inputs(sum(map(abs, documents)), *heads, dim)
    found, expected, segments = results(documents, q, k, v, grad, window, scale, softcap)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a[segments < 0] == 0).all()
        assert (a.double() - b).norm() <= 1.5 * BFLOAT16 * b.norm()


def test_is_closer_than_torch():
    """To the float64 formula, on a long document, in every gradient."""
    q, k, v, grad = inputs(1000)
    found, expected, _ = results([1000], q, k, v, grad)
    turned = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    torchs = [x.transpose(1, 2) for x in torch.autograd.grad(out, turned, grad.transpose(1, 2))]
    for a, b, exact in zip(found[1:], torchs, expected[1:], strict=True):
        assert (a.double() - exact).norm() <= 1.05 * (b.double() - exact).norm()


def test_a_document_does_not_see_its_neighbours():
    """Bit for bit: a document's results are those it has alone, whatever stands beside it."""
    q, k, v, grad = inputs(300, 4, 4)
    found, _, _ = results([90, 130, 80], q, k, v, grad)
    part = slice(90, 220)
    alone, _, _ = results([130], *(x[:, part].detach().requires_grad_() for x in (q, k, v, grad)))
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a[:, part], b)


@pytest.mark.parametrize("documents", [[200] * 6, [700]])
def test_does_not_depend_on_the_number_of_threads(documents):
    q, k, v, grad = inputs(sum(documents), 4, 1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(documents, q, k, v, grad)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).abs().max() <= 2 * BFLOAT16 * b.abs().max()
            assert torch.equal(a, b) or len(documents) == 1  # parts of heads are summed in another order


def test_takes_tensors_as_they_lie():
    """Heads before tokens, every other head, a gradient that is one number for all."""
    q, k, v, grad = (x.detach() for x in inputs(100, 4, 4, 32))
    expected = results([60, 40], *(x.requires_grad_() for x in (q, k, v)), grad)[0]
    laid = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    for a, b in zip(expected, results([60, 40], *laid, grad)[0], strict=True):
        assert torch.equal(a, b)
    wider = [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in (q, k, v)]
    assert wider[0].stride(-1) == 2
    for a, b in zip(expected, results([60, 40], *wider, grad)[0], strict=True):
        assert torch.equal(a, b)
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand_as(grad)
    same = [results([60, 40], q, k, v, g)[0] for g in (one, one.contiguous())]
    for a, b in zip(*same, strict=True):
        assert torch.equal(a, b)


def test_products_around_it_are_what_they_were():
    """It sets up the processor's tiles for itself: whoever used them before finds them as they were."""
    q, k, v, grad = inputs(128)
    a, b = inputs(256, 1, 1, 256)[:2]
    a, b = a.detach()[0, :, 0], b.detach()[0, :, 0]
    before = a @ b
    for _ in range(3):
        results([100, 28], q, k, v, grad)
        assert torch.equal(a @ b, before)


def test_numbers_that_are_none_stay_so():
    """A NaN reaches the result and the gradients of its document, and no other's."""
    q, k, v, grad = inputs(100)
    with torch.no_grad():
        k[0, 70, 0, 3] = torch.nan
    out, dq, dk, dv = results([60, 40], q, k, v, grad)[0]
    for x in (out, dq, dk, dv):
        assert torch.isfinite(x[:, :60]).all()
        assert torch.isnan(x[:, 60:]).any()


def test_compiles_into_one_graph():
    """Its shapes are known without running it: torch.compile takes it as it is, gradients and all."""
    q, k, v, grad = inputs(100)
    layout = AttentionLayout.from_segments(torch.tensor([[0] * 60 + [1] * 40]))
    documents = layout.longest_first

    def both(q, k, v):
        return torch.ops.ropewalk.attention(q[0], k[0], v[0], documents, 1 << 40, 0.0, 0.125)[0] * 2

    outs = [run(q, k, v) for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager"))]
    assert torch.equal(*outs)
    slopes = [torch.autograd.grad(out, (q, k, v), grad[0]) for out in outs]
    for a, b in zip(*slopes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("less", ["-mno-amx-bf16", "-mno-amx-bf16 -mno-avx512bf16"])
def test_processors_with_less_do_the_same(less, tmp_path):
    """As compiled for those without AMX, and without AVX512-BF16 too."""
    names = "equals_the_explicit or closer_than_torch or does_not_see or that_are_none"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    compiler = f"{os.environ.get('CXX') or 'g++'} {less}"
    environment = os.environ | {"CXX": compiler, "ROPEWALK_CACHE": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("....")  # and not skipped
