"""The fast path for one row computes what torch's matrix product does, where it is taken and where not."""

import pytest
import torch

from ropewalk.ops import Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (96,), (1, 3, 96), (4, 1, 96)])
def test_equals_the_matrix_product_in_float64(shape, dtype, bias):
    torch.manual_seed(0)
    layer = Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            out = layer(x)
        assert (out.shape, out.dtype) == ((*shape[:-1], 40), dtype)
        assert out.requires_grad == graded
        # One rounding of the sum; with a bias the product is rounded before it is added.
        torch.testing.assert_close(
            out.double(), exact, rtol=0.008 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
        )


def test_a_row_that_is_not_contiguous():
    layer = Linear(8, 4, bias=False).bfloat16()
    x = torch.randn(8, 2).bfloat16().t()[:1]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_is_a_linear_layer_to_everyone_else():
    assert isinstance(Linear(2, 2), torch.nn.Linear)
