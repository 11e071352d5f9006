"""RMSNorm's borrowed gradient is the real one; RoPE rotates; frequencies are transformers'."""

import math

import pytest
import torch

from ropewalk.ops import (
    apply_rope,
    references,
    rms_norm,
    rms_norm_reference,
    rope_frequencies,
    rope_tables,
)
from ropewalk.ops.rope import effective_length


def test_rms_norm_gradient_is_right_in_float32():
    """Against float64, with a mean far from 0: LayerNorm's own gradient would be visibly wrong."""
    x = (torch.randn(3, 5, 24, generator=torch.manual_seed(0)) + 2.0).requires_grad_()
    scale = torch.randn(24, generator=torch.manual_seed(1)).requires_grad_()
    weights = torch.randn(3, 5, 24, generator=torch.manual_seed(2))
    (rms_norm(x, scale, 1e-3) * weights).sum().backward()
    x64, scale64 = x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    y64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-3) * scale64
    (y64 * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scale.grad.double(), scale64.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, scale, 1e-3), y64.float(), atol=1e-5, rtol=1e-5)


def test_rms_norm_in_float64_is_exact():
    """Forward, gradients by finite differences, and a float32 scale beside float64 values."""
    x = (torch.randn(3, 5, 24, generator=torch.manual_seed(0)).double() + 2.0).requires_grad_()
    scale = torch.randn(24, generator=torch.manual_seed(1)).double().requires_grad_()
    with torch.no_grad():
        for factor in (scale, scale.float()):
            torch.testing.assert_close(rms_norm(x, factor, 1e-3), rms_norm_reference(x, factor, 1e-3))
        torch.testing.assert_close(
            rms_norm_reference(x, scale, 1e-3),
            x / (x.square().sum(-1, keepdim=True) / 24 + 1e-3).sqrt() * scale,
            rtol=1e-14,
            atol=1e-14,
        )
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, scale))


def test_references_replace_rms_norm():
    x, scale = torch.randn(7, 64, generator=torch.manual_seed(0)).bfloat16(), torch.ones(64)
    with references():
        assert rms_norm(x, scale, 1e-6).grad_fn is None
        y = rms_norm(x.requires_grad_(), scale, 1e-6)
    assert torch.equal(y, rms_norm_reference(x, scale, 1e-6))
    assert "RMSNorm" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("frozen", ["none", "scale", "x"])
def test_rms_norm_in_bfloat16_rounds_once(frozen):
    x = (torch.randn(7, 64, generator=torch.manual_seed(0)) * 3 + 1).bfloat16()
    scale = torch.randn(64, generator=torch.manual_seed(1)).bfloat16()
    x.requires_grad_(frozen != "x")
    scale.requires_grad_(frozen != "scale")
    out = rms_norm(x, scale, 1e-6)
    expected = rms_norm_reference(x, scale, 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0, rtol=2**-7)
    inputs = [t for t in (x, scale) if t.requires_grad]
    weights = torch.randn(7, 64, generator=torch.manual_seed(2)).bfloat16()
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


def test_rope_keeps_lengths_and_makes_products_depend_on_distance_only():
    frequency, factor = rope_frequencies(100.0, 8, None, 64)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.manual_seed(0))

    def product(i: int, j: int) -> float:
        tables = rope_tables(torch.tensor([[i, j]]), frequency, factor, torch.float32)
        rotated = apply_rope(torch.cat((q, k), 1), *tables)
        assert math.isclose(rotated[0, 0].norm().item(), q.norm().item(), rel_tol=1e-5)
        return (rotated[0, 0] @ rotated[0, 1].T).item()

    assert math.isclose(product(3, 1), product(40, 38), abs_tol=1e-4)
    assert not math.isclose(product(3, 1), product(3, 2), abs_tol=1e-2)
    assert math.isclose(product(0, 0), (q[0, 0] @ k[0, 0].T).item(), abs_tol=1e-5)


def test_partial_rope_leaves_the_rest_alone():
    frequency, factor = rope_frequencies(100.0, 3, None, 64)  # three elements: two pairs, as in transformers
    assert len(frequency) == 2
    x = torch.randn(1, 5, 2, 10, generator=torch.manual_seed(0))
    out = apply_rope(x, *rope_tables(torch.arange(5)[None], frequency, factor, torch.float32))
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert not torch.allclose(out[:, 1:, :, :4], x[:, 1:, :, :4])


LONG = {
    "short_factor": [1.0 + i / 10 for i in range(32)],
    "long_factor": [2.0 + i for i in range(32)],
}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.9},
    {"rope_type": "longrope", "original_max_position_embeddings": 16} | LONG,
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 3.0} | LONG,
]


@pytest.mark.parametrize("length", [1, 16, 17, 64, 100])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"] if s else "default")
def test_frequencies_are_those_of_transformers(scaling, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 500.0}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=64, rope_parameters=parameters
    )
    kind = parameters["rope_type"]
    frequency, factor = rope_frequencies(500.0, 64, scaling, 64, length)
    if kind == "default":
        expected, wanted = 1.0 / 500.0 ** (torch.arange(0, 64, 2) / 64), 1.0
    else:
        expected, wanted = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(frequency, expected, atol=0, rtol=2e-7)
    assert math.isclose(factor, wanted)
    if scaling is not None and kind in ("dynamic", "longrope"):
        same = rope_frequencies(500.0, 64, scaling, 64, effective_length(scaling, 64, length))
        assert torch.equal(same[0], frequency)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size", "pairs"), [(3, 64, 32), (1, 6, 3), (2, 20, 5)])
def test_rope_and_its_gradient_equal_the_formula(dtype, heads, size, pairs):
    """On tensors that lie in any way; the reference is float64 on the same rounded tables."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, heads, 7, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    grad = torch.randn(2, 7, heads, size, generator=generator).to(dtype)
    positions = torch.randint(0, 1000, (2, 7), generator=generator)
    tables = rope_tables(positions, torch.rand(pairs, generator=generator), 1.0, dtype)
    out = apply_rope(x, *tables)
    wide = x.detach().double().requires_grad_()
    expected = apply_rope(wide, *(t.double() for t in tables))
    slopes = [
        torch.autograd.grad(a, b, c)[0] for a, b, c in ((out, x, grad), (expected, wide, grad.double()))
    ]
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    for a, b in ((out, expected), slopes):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= rounding * b.abs().max()
