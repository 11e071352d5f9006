"""SwiGLU's product equals its formula, both ways, and keeps its inputs only."""

import pytest
import torch

from ropewalk.ops import gated_silu, gated_silu_reference, references


def pair(*shape, dtype, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * size).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 300, 129)])
def test_equals_the_formula_in_float64(dtype, shape):
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-14}[dtype]
    gate, up = pair(*shape, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (gate, up)]
    out, expected = gated_silu(gate, up), gated_silu_reference(*exact)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = out, *torch.autograd.grad(out, (gate, up), grad)
    wanted = expected, *torch.autograd.grad(expected, exact, grad.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= rounding * (b.abs().max() + 1e-3)


def test_far_from_zero():
    """No overflow and no number lost, however large: 0 below, the product above; NaN stays."""
    gate = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 1e4, float("nan")], requires_grad=True)
    up = torch.full_like(gate, 2.0)
    out = gated_silu(gate, up)
    (slope,) = torch.autograd.grad(out.nansum(), gate)
    torch.testing.assert_close(out[:6], gated_silu_reference(gate[:6], up[:6]), atol=1e-30, rtol=1e-6)
    assert out[6].isnan()
    assert torch.isfinite(slope[:6]).all()


def test_takes_tensors_as_they_lie():
    gate, up = pair(6, 8, dtype=torch.bfloat16)
    turned = [x.detach().t().requires_grad_() for x in (gate, up)]
    out, other = gated_silu(gate, up), gated_silu(*turned)
    assert torch.equal(out, other.t())
    grad = torch.ones(8, 6, dtype=torch.bfloat16)
    (a,), (b,) = torch.autograd.grad(out, gate, grad.t()), torch.autograd.grad(other, turned[0], grad)
    assert torch.equal(a, b.t())


def test_references_are_plain_torch():
    gate, up = pair(4, 4, dtype=torch.bfloat16)
    with references():
        assert torch.equal(gated_silu(gate, up), gated_silu_reference(gate, up))
