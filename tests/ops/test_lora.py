"""lora_linear equals the plain form in value and gradients, and does no work for the frozen layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.ops.lora import lora_linear, lora_linear_reference


def inputs(shape, columns, rows, rank, dtype, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    x, weight = draw(*shape, columns).requires_grad_(), draw(rows, columns)
    a, b = draw(rank, columns).requires_grad_(), draw(rows, rank).requires_grad_()
    return x, weight, draw(rows) if bias else None, a, b


def value_and_gradients(function, values, scale, slope):
    y = function(*values, scale)
    leaves = [v for v in values if v is not None and v.requires_grad]
    return y.detach(), torch.autograd.grad(y, leaves, slope)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    scale=st.floats(-3, 3),
    bias=st.booleans(),
    needs=st.sampled_from([(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)]),
)
def test_equals_plain_in_float64(shape, sizes, scale, bias, needs):
    values = inputs(shape, *sizes, torch.float64, bias)
    for value, need in zip((values[0], *values[3:]), needs, strict=True):
        value.requires_grad_(bool(need))
    slope = torch.randn(*shape, sizes[1], dtype=torch.float64)
    ours = value_and_gradients(lora_linear, values, scale, slope)
    torch.testing.assert_close(ours, value_and_gradients(lora_linear_reference, values, scale, slope))


def test_gradcheck():
    values = inputs((3,), 4, 5, 2, torch.float64, bias=True)
    assert torch.autograd.gradcheck(lora_linear, (*values, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_float64_as_the_plain_form(dtype):
    values = inputs((2, 100), 64, 48, 8, dtype)
    slope = torch.randn(2, 100, 48).to(dtype)
    wide = [v if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in values]
    exact = value_and_gradients(lora_linear_reference, wide, 2.0, slope.double())
    plain = value_and_gradients(lora_linear_reference, values, 2.0, slope)
    ours = value_and_gradients(lora_linear, values, 2.0, slope)
    for mine, theirs, true in zip(
        (ours[0], *ours[1]), (plain[0], *plain[1]), (exact[0], *exact[1]), strict=True
    ):
        assert mine.dtype == dtype
        bound = 1.2 * (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (mine.double() - true).norm() <= bound


def test_frozen_layer_gets_no_gradient_and_little_is_kept():
    x, weight, bias, a, b = inputs((50,), 40, 30, 2, torch.float32, bias=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(x, weight.requires_grad_(), bias.requires_grad_(), a, b, 1.0)
    own = {x.data_ptr(), weight.data_ptr(), a.data_ptr(), b.data_ptr()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(50, 2)]
    y.sum().backward()
    assert weight.grad is None
    assert bias.grad is None


def test_works_in_compiled_code():
    values = inputs((3, 5), 6, 7, 2, torch.float64, bias=True)

    def step(x):
        return torch.tanh(lora_linear(torch.relu(x), *values[1:], 0.5)).sum()

    leaves = (values[0], *values[3:])
    expected = torch.autograd.grad(step(values[0]), leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(values[0]), leaves), expected)


def test_double_backward_is_refused():
    values = inputs((3,), 4, 5, 2, torch.float64)
    (slope,) = torch.autograd.grad(lora_linear(*values, 1.0).square().sum(), values[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
