"""bfloat16 products done in float32 are the same products, rounded once. Forced on, on any machine."""

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ropewalk.ops.product as product_module
from ropewalk.ops import attention, linear_cross_entropy, references
from ropewalk.ops.attention_layout import AttentionLayout
from ropewalk.ops.linear import Linear
from ropewalk.ops.product import multiply, product
from ropewalk.train.activations import _selective

SHAPES = [(96, 70, 65), (64, 3000, 2000), (3000, 64, 2000), (2000, 3000, 64), (64, 64, 64), (700, 129, 30000)]
"""M, K, N: each side is the longest once, and cut into panels that do not divide it."""


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropewalk.ops.product._faster", True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def off(found: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_the_exact_one_rounded_once(shape: tuple[int, int, int], transposed: bool) -> None:
    m, k, n = shape
    a, b, bias = drawn(m, k), drawn(k, n, seed=1), drawn(n, seed=2)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    exact = a.double() @ b.double()
    rounding = off(exact.bfloat16(), exact)
    assert off(product(a, b), exact) < 1.02 * rounding
    assert off(product(a, b, bias), exact + bias.double()) < 1.02 * rounding
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    assert multiply(a, b, out) is out
    assert torch.equal(out, product(a, b))
    multiply(a, b, out, add=True)
    assert off(out, 2 * exact) < 2 * rounding


@pytest.mark.parametrize("rows", [256, 257, 600])
def test_a_long_sum_is_done_for_some_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a head's gradient is, on processors that multiply bfloat16: the parts are the whole."""
    monkeypatch.setattr("ropewalk.ops.product._faster", False)
    a, b = drawn(rows, 8192), drawn(8192, 48, seed=1)
    exact = a.double() @ b.double()
    rounding = off(exact.bfloat16(), exact)
    out = torch.full((rows, 48), float("nan"), dtype=torch.bfloat16)
    assert multiply(a, b, out) is out
    assert off(out, exact) < 1.02 * rounding
    multiply(a, b, out, add=True)
    assert off(out, 2 * exact) < 2 * rounding


def test_gradients_are_those_of_the_plain_product() -> None:
    x, weight, bias, slope = (
        drawn(200, 96),
        drawn(130, 96, seed=1),
        drawn(130, seed=2),
        drawn(200, 130, seed=3),
    )
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    found = torch.autograd.grad(product(x, weight.t(), bias), inputs, slope)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(exact[0] @ exact[1].t() + exact[2], exact, slope.double())
    for one, other in zip(found, wanted, strict=True):
        assert off(one, other) < 4e-3
        assert one.is_contiguous()  # the optimizer takes gradients in pieces of memory


def test_the_narrow_product_is_used_for_few_rows_other_types_and_in_references() -> None:
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    def widened(a: Tensor, b: Tensor) -> bool:
        calls.clear()
        with Watch():
            product(a, b)
        return "ropewalk.product.default" in calls

    a, b = drawn(64, 64), drawn(64, 64)
    assert widened(a, b)
    assert not widened(a[:63], b)
    assert not widened(a[:, :16], b[:16])
    assert not widened(a.float(), b.float())
    with references():
        assert not widened(a, b)


def test_what_generation_has_left_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_module, "_buffers", threading.local())
    a, b = drawn(80, 96), drawn(96, 70, seed=1)
    with torch.inference_mode():
        first = product(a, b)
    assert torch.equal(product(a.requires_grad_(), b), first)


def test_a_linear_layer_computes_the_same_compiled_and_not() -> None:
    layer = Linear(96, 128).bfloat16()
    x = drawn(2, 70, 96).requires_grad_()
    y = layer(x)
    y.sum().backward()
    eager = layer.weight.grad, x.grad
    layer.weight.grad = x.grad = None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    again = compiled(x)
    again.sum().backward()
    assert torch.equal(y, again)
    assert torch.equal(eager[0], layer.weight.grad)
    assert torch.equal(eager[1], x.grad)


@pytest.mark.parametrize("length", [40, 300])
def test_attention_and_loss_stay_what_they_are(length: int) -> None:
    q, k, v = (drawn(1, length, 2, 16, seed=i).requires_grad_() for i in range(3))

    def run() -> list[Tensor]:
        out = attention(q, k, v, layout=AttentionLayout.rows(1, length))
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    found = run()
    with references():
        wanted = run()
    assert all(off(one, other.double()) < 2e-2 for one, other in zip(found, wanted, strict=True))

    hidden, weight = drawn(length, 80).requires_grad_(), drawn(500, 80, seed=1).mul_(0.1).requires_grad_()
    labels = torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100

    def loss() -> list[Tensor]:
        value = linear_cross_entropy(hidden, weight, labels, chunk=128)
        return [value, *torch.autograd.grad(value, (hidden, weight))]

    found = loss()
    with references():
        wanted = loss()
    assert all(off(one, other.double()) < 2e-2 for one, other in zip(found, wanted, strict=True))


def test_selective_checkpointing_keeps_a_product_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    write = product_module._write

    def counted(*arguments):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        return write(*arguments)

    monkeypatch.setattr(product_module, "_write", counted)
    x, layer = drawn(80, 96).requires_grad_(), Linear(96, 96).bfloat16()
    checkpoint(lambda x: layer(x).square(), x, use_reentrant=False, context_fn=_selective).sum().backward()
    assert count == 3  # forward, and the two of the backward pass
