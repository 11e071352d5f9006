"""Log-probabilities and divergences of a linear head equal the plain forms in value and gradients."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.ops import linear_cross_entropy, linear_kl, linear_kl_top_k, linear_logprobs, references

head = import_module("ropewalk.ops.head")


def draw(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * scale).to(dtype)


def inputs(n, h, v, dtype=torch.float64, bias=True, ignored=0.4, seed=0, scale=0.5):
    """hidden, weight and bias that want gradients, labels, and which rows are scored."""
    hidden = draw(n, h, seed=seed, dtype=dtype).requires_grad_()
    weight = draw(v, h, seed=seed + 1, dtype=dtype, scale=scale).requires_grad_()
    vector = draw(v, seed=seed + 2, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    scored = torch.rand(n, generator=torch.Generator().manual_seed(seed)) >= ignored
    return hidden, weight, vector, labels.masked_fill(~scored, -100), scored


def value_and_gradients(function, leaves, slope):
    value = function()
    return value.detach(), *torch.autograd.grad(value, [t for t in leaves if t is not None], slope)


def calls(values, softcap, temperature, teacher_seed=7):
    """The three losses as functions of `chunk`, on the same inputs."""
    hidden, weight, bias, labels, scored = values
    vocab, size = weight.shape
    dtype, options = hidden.dtype, {"bias": bias, "softcap": softcap}
    teacher = (
        draw(len(hidden), size + 1, seed=teacher_seed, dtype=dtype),
        draw(vocab, size + 1, seed=8, dtype=dtype),
    )
    k = min(3, vocab)
    known, tokens = (teacher[0] @ teacher[1].t()).double().log_softmax(1).topk(k, 1)
    return {
        "logprobs": lambda chunk: linear_logprobs(hidden, weight, labels, chunk=chunk, **options),
        "kl": lambda chunk: linear_kl(
            hidden,
            weight,
            *teacher,
            scored,
            teacher_softcap=softcap and softcap + 1,
            temperature=temperature,
            chunk=chunk,
            **options,
        ),
        "top_k": lambda chunk: linear_kl_top_k(
            hidden, weight, tokens, known, scored, temperature=temperature, chunk=chunk, **options
        ),
    }


def slope_of(name, n, dtype):
    return draw(n, seed=5, dtype=dtype) if name == "logprobs" else torch.tensor(-0.7, dtype=dtype)


@pytest.mark.parametrize("name", ["logprobs", "kl", "top_k"])
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 20), st.integers(1, 6), st.integers(1, 40)),
    chunk=st.integers(1, 25),
    ignored=st.sampled_from((0.0, 0.4, 1.1)),
    softcap=st.sampled_from((None, 3.0)),
    temperature=st.sampled_from((1.0, 2.5)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_reference_for_any_shape(name, sizes, chunk, ignored, softcap, temperature, bias, seed):
    values = inputs(*sizes, bias=bias, ignored=ignored, seed=seed)
    function = calls(values, softcap, temperature)[name]
    slope = slope_of(name, sizes[0], torch.float64)
    with references():
        expected = value_and_gradients(lambda: function(chunk), values[:3], slope)
    ours = value_and_gradients(lambda: function(chunk), values[:3], slope)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(function(chunk), expected[0], rtol=1e-8, atol=1e-9)


def test_logprobs_are_what_cross_entropy_sums():
    hidden, weight, bias, labels, _ = inputs(30, 5, 11)
    total = linear_cross_entropy(hidden, weight, labels, bias=bias)
    each = linear_logprobs(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(-each.sum(), total)
    assert (each[labels == -100] == 0).all()
    plain = F.linear(hidden, weight, bias).log_softmax(1)
    for row in (labels >= 0).nonzero().flatten().tolist():
        torch.testing.assert_close(each[row], plain[row, labels[row]])


def test_a_preference_loss_on_logprobs_has_autograd_s_gradient():
    """The slopes of the rows differ and depend on the values: as in DPO."""
    hidden, weight, bias, labels, _ = inputs(12, 4, 9)

    def loss(logprobs):
        chosen, rejected = logprobs.view(2, 6).sum(1)
        return -F.logsigmoid(0.3 * (chosen - rejected))

    leaves = (hidden, weight, bias)
    ours = torch.autograd.grad(loss(linear_logprobs(hidden, weight, labels, bias=bias, chunk=5)), leaves)
    with references():
        plain = torch.autograd.grad(loss(linear_logprobs(hidden, weight, labels, bias=bias)), leaves)
    torch.testing.assert_close(ours, plain)


def test_gradcheck_of_logprobs():
    hidden, weight, bias, labels, _ = inputs(6, 3, 5)
    function = lambda h, w, b: linear_logprobs(h, w, labels, bias=b, softcap=2.0, chunk=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_divergences_by_their_definition():
    hidden, weight, _, _, scored = inputs(8, 4, 9, bias=False)
    teacher = draw(8, 5, seed=3), draw(9, 5, seed=4)
    p, q = ((h @ w.t() / 2.0).softmax(1)[scored] for h, w in (teacher, (hidden, weight)))
    whole = linear_kl(hidden, weight, *teacher, scored, temperature=2.0)
    torch.testing.assert_close(whole, (p * (p / q).log()).sum())
    known, tokens = (teacher[0] @ teacher[1].t() / 2.0).log_softmax(1).topk(3, 1)
    some = linear_kl_top_k(hidden, weight, tokens, known, scored, temperature=2.0)
    pk, qk = (x.gather(1, tokens[scored]) for x in (p, q))
    r, s = 1 - pk.sum(1), 1 - qk.sum(1)
    torch.testing.assert_close(some, (pk * (pk / qk).log()).sum() + (r * (r / s).log()).sum())
    assert 0 < some < whole
    known, tokens = (teacher[0] @ teacher[1].t() / 2.0).log_softmax(1).topk(9, 1)
    torch.testing.assert_close(linear_kl_top_k(hidden, weight, tokens, known, scored, temperature=2.0), whole)


def test_a_student_that_is_its_teacher_learns_nothing():
    hidden, weight, _, _, scored = inputs(20, 6, 30, torch.float32, bias=False)
    known, tokens = (hidden @ weight.t()).detach().log_softmax(1).topk(4, 1)
    losses = (
        linear_kl(hidden, weight, hidden, weight, scored),
        linear_kl_top_k(hidden, weight, tokens, known, scored),
    )
    for loss in losses:
        assert abs(loss.item()) < 1e-4
        assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_tokens_the_teacher_rules_out_are_no_nan():
    hidden, weight, bias, _, scored = inputs(5, 4, 6, torch.float32)
    rows = torch.zeros(5, 6).masked_fill(torch.arange(6) > 2, -torch.inf)
    known, tokens = rows.log_softmax(1).topk(5, 1)
    losses = (
        linear_kl(
            hidden, weight, torch.ones(5, 1), torch.zeros(6, 1), scored, bias=bias, teacher_bias=rows[0]
        ),
        linear_kl_top_k(hidden, weight, tokens, known, scored, bias=bias),
    )
    for loss in losses:
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["logprobs", "kl", "top_k"])
def test_is_as_near_to_float64_as_the_plain_form(name, dtype):
    values = inputs(256, 64, 500, dtype, scale=0.1)
    wide = [v.detach().double().requires_grad_() for v in values[:3]]
    slope = slope_of(name, 256, torch.float32)
    function = calls(values, None, 1.5)[name]
    # the teacher's rounded values are what both are given
    exact_function = calls((*wide, *values[3:]), None, 1.5)[name]
    with references():
        plain = value_and_gradients(lambda: function(64), values[:3], slope)
        exact = value_and_gradients(lambda: exact_function(64), wide, slope.double())
    ours = value_and_gradients(lambda: function(64), values[:3], slope)
    if name != "logprobs" and dtype == torch.bfloat16:  # the teacher differs in float64: compare to plain
        exact = plain
    for mine, other, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == other.dtype
        error, bound = ((x.double() - true).norm() / true.double().norm() for x in (mine, other))
        assert error < 1.5 * bound + (0.008 if dtype == torch.bfloat16 else 1e-5)


def test_blocks_inside_a_chunk_change_nothing(monkeypatch):
    values = inputs(50, 8, 33)
    functions = calls(values, 3.0, 2.0)
    expected = {name: function(50) for name, function in functions.items()}
    monkeypatch.setattr(head, "_CPU_BLOCK", 100)
    monkeypatch.setattr(head, "_CHUNK_BYTES", 4000)
    for name, function in functions.items():
        torch.testing.assert_close(function(50), expected[name])


def test_never_holds_a_tokens_by_vocab_matrix():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    functions = calls(inputs(2048, 4, 512, torch.float32, ignored=0), None, 1.0)
    for function in functions.values():
        with Largest() as largest:
            function(64).sum().backward()
        assert largest.elements == 64 * 512


def test_mistakes_are_named():
    hidden, weight, _, labels, scored = inputs(5, 4, 6)
    with pytest.raises(UserError, match="vocabulary of 7 tokens, the student of 6"):
        linear_kl(hidden, weight, hidden, torch.zeros(7, 4), scored)
    labels[2] = 6
    with pytest.raises(UserError, match="label 6 in row 2"):
        linear_logprobs(hidden, weight, labels)
