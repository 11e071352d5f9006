"""Gradients of scales and biases are the exact ones but for a rounding, over however many rows."""

import pytest
import torch
import torch.nn.functional as F

from ropewalk.ops import norm


def gradients(function, x, parameters, slope, dtype):
    x, *parameters = (t.detach().to(dtype).requires_grad_() for t in (x, *parameters))
    y = function(x, *parameters)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), slope.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 64), (16384, 96)])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms without a kernel"])
def test_many_rows_add_up(dtype, shape, kind, monkeypatch):
    """The gradients point one way, so that a sum in few bits would stop growing."""
    if kind == "rms without a kernel":
        monkeypatch.setattr(norm, "takes", lambda x: False)
    torch.manual_seed(0)
    x, scale, bias, slope = (torch.randn(n).to(dtype) for n in (shape, shape[-1:], shape[-1:], shape))
    slope += 0.3
    size = shape[-1:]
    if kind == "layer":
        found = gradients(lambda x, s, b: norm.layer_norm(x, s, b, 1e-5), x, (scale, bias), slope, dtype)
        exact = gradients(
            lambda x, s, b: F.layer_norm(x, size, s, b, 1e-5), x, (scale, bias), slope, torch.float64
        )
    else:
        found = gradients(lambda x, s: norm.rms_norm(x, s, 1e-5), x, (scale,), slope, dtype)
        exact = gradients(lambda x, s: norm.rms_norm_reference(x, s, 1e-5), x, (scale,), slope, torch.float64)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - right).norm() < bound * right.norm()


def test_a_layer_norm_is_torchs():
    x, scale, bias = torch.randn(7, 48).bfloat16(), torch.randn(48).bfloat16(), torch.randn(48).bfloat16()
    expected = F.layer_norm(x, (48,), scale, bias, 1e-5)
    assert torch.equal(norm.layer_norm(x.requires_grad_(), scale, bias, 1e-5), expected)
    with torch.no_grad():
        assert torch.equal(norm.layer_norm(x, scale, bias, 1e-5), expected)
