"""linear_cross_entropy equals the plain form in loss and gradients, for every option, chunking and dtype."""

import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ropewalk.ops.linear_logprobs import linear_logprobs

module = import_module("ropewalk.ops.head")

OPTIONS = [
    {"softcap": cap, "z_loss": z, "with_bias": bias}
    for cap, z, bias in itertools.product((None, 3.0), (0.0, 0.01), (False, True))
]


def inputs(n, h, v, dtype=torch.float32, with_bias=False, ignored=0.4, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    bias = None
    if with_bias:
        bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return hidden, weight, bias, labels


def loss_and_gradients(function, hidden, weight, bias, labels, slope=1.0, **options):
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss = function(hidden, weight, labels, bias=bias, **options)
    return loss.detach(), torch.autograd.grad(loss * slope, leaves)


def check_equal(ours, plain, **tolerance):
    torch.testing.assert_close(ours[0], plain[0], **tolerance)
    for mine, theirs in zip(ours[1], plain[1], strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 70),
    chunk=st.integers(1, 50),
    ignored=st.sampled_from((0.0, 0.3, 0.9, 1.0)),
    options=st.sampled_from(OPTIONS),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    slope=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_equals_plain_for_any_shape_and_pattern(n, h, v, chunk, ignored, options, needs, slope, seed):
    options = dict(options)
    hidden, weight, bias, labels = inputs(n, h, v, torch.float64, options.pop("with_bias"), ignored, seed)
    for x, need in zip((hidden, weight, bias), needs, strict=True):
        if x is not None:
            x.requires_grad_(need)
    if not any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        plain = linear_cross_entropy_reference(hidden, weight, labels, bias=bias, **options)
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk, **options), plain
        )
        return
    values = (hidden, weight, bias, labels, slope)
    plain = loss_and_gradients(linear_cross_entropy_reference, *values, **options)
    check_equal(loss_and_gradients(linear_cross_entropy, *values, chunk=chunk, **options), plain)


@pytest.mark.parametrize("options", OPTIONS)
def test_blocks_inside_a_chunk_change_nothing(options, monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", 100)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4000)
    options = dict(options)
    hidden, weight, bias, labels = inputs(50, 8, 33, torch.float64, options.pop("with_bias"))
    plain = loss_and_gradients(linear_cross_entropy_reference, hidden, weight, bias, labels, **options)
    check_equal(loss_and_gradients(linear_cross_entropy, hidden, weight, bias, labels, **options), plain)


class Rebuilt(torch.autograd.Function):
    """gradcheck walks one graph several times and ours can be walked once: build it anew each time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.labels, ctx.options = labels, options
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)

    @staticmethod
    def backward(ctx, slope):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            loss = linear_cross_entropy(*leaves[:2], ctx.labels, bias=leaves[2], **ctx.options)
        return *torch.autograd.grad(loss, leaves, slope), None, None


@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (2.0, 0.0), (None, 0.1), (2.0, 0.1)])
def test_gradcheck_in_float64(softcap, z_loss):
    hidden, weight, bias, labels = inputs(9, 4, 7, torch.float64, with_bias=True)
    options = {"softcap": softcap, "z_loss": z_loss, "chunk": 2}
    assert torch.autograd.gradcheck(Rebuilt.apply, (hidden, weight, bias, labels, options))


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_equals_float64(options):
    options = dict(options)
    values = inputs(300, 32, 500, with_bias=options.pop("with_bias"))
    wide = [x.detach().double().requires_grad_() if x is not None else None for x in values[:3]]
    exact = loss_and_gradients(linear_cross_entropy_reference, *wide, values[3], **options)
    loss, gradients = loss_and_gradients(linear_cross_entropy, *values, chunk=64, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients, exact[1], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_is_as_near_to_float64_as_the_plain_form(options):
    options = dict(options)
    values = inputs(1024, 64, 1000, torch.bfloat16, with_bias=options.pop("with_bias"), scale=0.1)
    wide = [x.detach().double().requires_grad_() if x is not None else None for x in values[:3]]
    exact = loss_and_gradients(linear_cross_entropy_reference, *wide, values[3], **options)
    plain = loss_and_gradients(linear_cross_entropy_reference, *values, **options)
    loss, gradients = loss_and_gradients(linear_cross_entropy, *values, chunk=256, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-4, atol=0)
    for mine, theirs, true in zip(gradients, plain[1], exact[1], strict=True):
        error = ((mine.double() - true).norm() / true.norm()).item()
        assert error < 1.5 * ((theirs.double() - true).norm() / true.norm()).item() + 1e-3
        assert error < 0.01


def test_confident_predictions_keep_their_small_gradient_in_bfloat16():
    """1 - p is formed before rounding: p itself would round to 1 and the gradient to nothing."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    expected = -torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(weight.grad[0, 0].float(), expected, rtol=0.005, atol=0)


def test_hopeless_targets_have_a_finite_loss():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [-500.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 1000.0
    assert hidden.grad.item() == 1000.0


def test_sum_over_pieces_equals_the_whole():
    """What makes gradient accumulation exact: pieces of any size add up."""
    hidden, weight, _, labels = inputs(120, 16, 90, torch.float64)
    whole = loss_and_gradients(linear_cross_entropy, hidden, weight, None, labels, 1 / 7)
    loss, d_weight, d_hidden = 0, torch.zeros_like(weight), []
    sizes = [1, 50, 60, 9]
    for piece, target in zip(hidden.detach().split(sizes), labels.split(sizes), strict=True):
        part = loss_and_gradients(
            linear_cross_entropy, piece.requires_grad_(), weight, None, target, 1 / 7, chunk=13
        )
        loss, d_weight = loss + part[0], d_weight + part[1][1]
        d_hidden.append(part[1][0])
    check_equal((loss, (torch.cat(d_hidden), d_weight)), whole, rtol=1e-12, atol=1e-12)


def test_no_scored_row_gives_zero_and_zero_gradients():
    hidden, weight, bias, labels = inputs(5, 4, 6, with_bias=True, ignored=1.1)
    hidden.data.fill_(float("nan"))  # never meets the head
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    loss.backward()
    assert loss.item() == 0.0
    for x in (hidden, weight, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_unscored_rows_never_meet_the_head():
    hidden, weight, _, labels = inputs(30, 4, 6)
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    poisoned.requires_grad_()
    clean = loss_and_gradients(linear_cross_entropy, hidden, weight, None, labels)
    check_equal(
        loss_and_gradients(linear_cross_entropy, poisoned, weight, None, labels), clean, rtol=0, atol=0
    )


@pytest.mark.parametrize("function", [linear_cross_entropy, lambda *a, **k: -linear_logprobs(*a, **k).sum()])
@pytest.mark.parametrize("chunks", [33, 600, 2047])
def test_many_chunks_add_up(function, chunks):
    """In bfloat16, where each chunk's part is the smaller beside the sum the more there are."""
    torch.manual_seed(0)
    share = 1 / torch.arange(1, 101).float()
    labels = torch.multinomial(share, 8 * chunks, replacement=True)
    hidden, weight = (torch.randn(n, 16).bfloat16() for n in (8 * chunks, 100))
    hidden += 0.3
    found, exact = (
        torch.autograd.grad(function(hidden.to(of.dtype), of.requires_grad_(), labels, chunk=8), of)[0]
        for of in (weight, weight.double())
    )
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_a_non_finite_logit_is_not_hidden():
    hidden, weight, _, labels = inputs(3, 4, 6, ignored=0)
    hidden.data[1, 1] = float("inf")
    assert not linear_cross_entropy(hidden, weight, labels).isfinite()


@pytest.mark.parametrize("value", [6, 1000, -1, -99, -101])
def test_a_label_outside_the_vocabulary_is_named(value):
    hidden, weight, _, labels = inputs(5, 4, 6)
    labels[3] = value
    with pytest.raises(UserError, match=rf"label {value} in row 3 .* vocabulary of 6 tokens"):
        linear_cross_entropy(hidden, weight, labels)


def test_frozen_head_gets_no_gradient_work(monkeypatch):
    hidden, weight, _, labels = inputs(20, 4, 6)
    weight.requires_grad_(False)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad is not None


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    hidden, weight, _, labels = inputs(20, 4, 6)
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    monkeypatch.setattr(module, "HeadGradients", None)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    loss = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    torch.testing.assert_close(loss, expected)


def test_tied_weight_collects_both_gradients():
    _, weight, _, labels = inputs(12, 5, 11, torch.float64)
    tokens = torch.arange(12) % 11
    ours, plain = (
        torch.autograd.grad(function(weight[tokens].tanh(), weight, labels), weight)
        for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    torch.testing.assert_close(ours, plain)


def test_second_backward_and_double_backward_are_refused():
    hidden, weight, _, labels = inputs(12, 5, 11)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="walked backward once"):
        loss.backward()
    loss = linear_cross_entropy(hidden, weight, labels)
    (slope,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_torch_compile_around_it_gives_the_same():
    hidden, weight, _, labels = inputs(20, 4, 30, torch.float64)

    def step(x):
        return linear_cross_entropy(torch.relu(x), weight, labels, chunk=8) / 3

    expected = torch.autograd.grad(step(hidden), (hidden, weight))
    compiled = torch.autograd.grad(torch.compile(step, backend="eager")(hidden), (hidden, weight))
    torch.testing.assert_close(compiled, expected)


def test_never_holds_a_tokens_by_vocab_matrix():
    """Every tensor that is made stays within the chunk's buffer, however many tokens there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    hidden, weight, _, labels = inputs(4096, 4, 512, ignored=0)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk=64).backward()
    assert largest.elements == 64 * 512
