"""The Triton kernel gives the plain form's losses and gradients: on a GPU, else in Triton's interpreter."""

import importlib.util
import itertools

import pytest
import torch

from ropewalk.ops.linear_cross_entropy import _plain_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
OPTIONS = list(itertools.product((None, 5.0), (0.0, 0.01), (False, True)))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(rows: int, vocab: int, dtype: torch.dtype, softcap, z_loss, scaled: bool, slopes: bool) -> None:
    from ropewalk.ops.cross_entropy_kernel import run_kernel

    torch.manual_seed(0)
    wide = torch.randn(rows, vocab + 8, device=DEVICE) * 4  # rows need not lie end to end
    logits = wide.to(dtype)[:, :vocab]
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    factors = torch.randn(rows, device=DEVICE) if scaled else None
    expected_slopes = logits.clone()
    expected = _plain_rows(expected_slopes, targets, softcap, z_loss, slopes, factors)
    before = wide.to(dtype)[:, vocab:].clone()
    found = run_kernel(logits, targets, softcap, z_loss, slopes, factors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(logits, expected_slopes, **tolerance)
    assert torch.equal(wide.to(dtype)[:, vocab:], before)


def all_of_it() -> None:
    dtypes = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
    for dtype, (softcap, z_loss, scaled) in itertools.product(dtypes, OPTIONS):
        for vocab, slopes in ((7, True), (4096, True), (9001, True), (300, False)):
            compare(3, vocab, dtype, softcap, z_loss, scaled, slopes)


def test_it_equals_the_plain_form(run_as_script):
    """In a process of its own: the interpreter is chosen when triton is imported."""
    run_as_script(__file__, {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loss_goes_through_it(monkeypatch):
    from ropewalk.ops import cross_entropy_kernel as module
    from ropewalk.ops import linear_cross_entropy, linear_cross_entropy_reference

    calls = []
    real = module.run_kernel
    monkeypatch.setattr(module, "run_kernel", lambda *a: calls.append(1) or real(*a))
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda").bfloat16().requires_grad_() for n in (300, 5000))
    labels = torch.randint(0, 5000, (300,))
    labels[::3] = -100
    ends = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = function(hidden, weight, labels, chunk=64)
        ends.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert len(calls) == -(-200 // 64)
    for mine, theirs in zip(*ends, strict=True):
        error = (mine - theirs).float().norm() / theirs.float().norm()
        assert error < 1e-2


if __name__ == "__main__":
    all_of_it()
