"""Kernels in C++: compiled once, kept, done without where they cannot be; and the cross-entropy."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ropewalk.ops.linear_cross_entropy import cross_entropy_rows
from ropewalk.ops.native import library

compiled = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


def reference(logits, targets, z_loss, factors):
    """Losses and the gradient of their sum weighted by `factors`, in float64."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, reduction="none") + z_loss * x.logsumexp(1).square()
    weighted = losses if factors is None else losses * factors.double()
    return losses.detach(), torch.autograd.grad(weighted.sum(), x)[0]


@compiled
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 49153])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_float64(vocabulary, z_loss, weighted):
    """Losses to float32's rounding, whatever the logits' size; gradients to their dtype's."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(20, generator=generator) if weighted else None
    targets = torch.randint(0, vocabulary, (20,), generator=generator)
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-9)):
        for size in (0.1, 4.0, 60.0):
            logits = (torch.randn(20, vocabulary, generator=generator) * size).to(dtype)
            losses, slopes = reference(logits, targets, z_loss, factors)
            only = cross_entropy_rows(logits.clone(), targets, None, z_loss, False, factors)
            found = cross_entropy_rows(logits, targets, None, z_loss, True, factors)
            assert torch.equal(only, found)
            assert (found - losses).abs().max() <= 1e-6 * max(10.0, losses.max().item())
            scale = slopes.norm() + (1 if vocabulary == 1 else 0)
            assert (logits.double() - slopes).norm() <= 1.1 * rounding * scale


@compiled
def test_cross_entropy_of_no_number_is_none():
    logits = torch.randn(4, 300).bfloat16()
    logits[1, 5], logits[2, 7] = torch.nan, torch.inf
    losses = cross_entropy_rows(logits, torch.arange(4), None, 0.0, True)
    assert losses.isnan().tolist() == logits.isnan().any(1).tolist() == [False, True, True, False]


PROGRAM = """
import torch
from ropewalk.ops import linear_cross_entropy
from ropewalk.ops.native import library, unavailable
hidden, weight = torch.linspace(-1, 1, 64).view(4, 16), torch.linspace(-1, 1, 160).view(10, 16)
loss = linear_cross_entropy(hidden, weight, torch.arange(4))
print(library() is not None, unavailable(), round(float(loss), 4))
"""


def run(cache, compiler):
    environment = os.environ | {"ROPEWALK_CACHE": str(cache), "CXX": compiler}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@compiled
def test_is_compiled_once_and_done_without_where_it_cannot_be(tmp_path):
    """The same loss with and without; the reason is told; a failed compiler leaves no library."""
    compiler = os.environ.get("CXX", "g++")
    first = run(tmp_path / "cache", compiler)
    assert first[:2] == ["True", "None"]
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    assert run(tmp_path / "cache", compiler) == first
    assert made.stat().st_mtime_ns == stamp

    for wrong, reason in (
        ("/nowhere/g++ -O1", "there is no C++ compiler (/nowhere/g++)"),
        ("false", "failed"),
    ):
        found = run(tmp_path / "other", wrong)
        assert found[0] == "False"
        assert reason in " ".join(found)
        assert found[-1] == first[-1]
    assert not list((tmp_path / "other").rglob("*.so"))
