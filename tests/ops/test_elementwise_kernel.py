"""Triton's sums and multiples are torch's: on a GPU, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1,), (3, 7), (5, 4096), (2, 3, 1365))


def sums() -> None:
    """Exact, whatever the types; in place where the first is float32, and nothing beside it is written."""
    from ropewalk.ops.elementwise_kernel import add

    for shape in SHAPES:
        for first in (torch.bfloat16, torch.float16, torch.float32):
            around = torch.randn(torch.Size(shape).numel() + 64, device=DEVICE).to(first)
            total = around[:-64].view(shape)
            part = torch.randn(shape, device=DEVICE).bfloat16()
            expected, beside = total.float() + part.float(), around[-64:].clone()
            found = add(total, part)
            assert torch.equal(found, expected)
            assert (found is total) == (first == torch.float32)
            assert torch.equal(around[-64:], beside)


def multiples() -> None:
    """Multiplied in float32 and rounded once, in place."""
    from ropewalk.ops.elementwise_kernel import scale_

    factor = torch.tensor(1 / 32760, device=DEVICE)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=DEVICE).to(dtype)
            expected = x.float() * factor
            assert scale_(x, factor) is x
            if dtype == torch.float32 or DEVICE == "cuda":
                assert torch.equal(x, expected.to(dtype))
            else:  # the interpreter cuts where a GPU rounds
                assert ((x.float() - expected).abs() <= expected.abs() / 128).all()


def test_they_are_torchs(run_as_script):
    """In a process of its own: the interpreter is chosen when triton is imported."""
    run_as_script(__file__, {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_that_a_gpu_adds_up_go_through_them(monkeypatch):
    """A bfloat16 weight's, from the second on; and the head's, once for each loss."""
    from ropewalk.ops import elementwise_kernel, linear_cross_entropy
    from ropewalk.train.optim import Optimizer, OptimizerConfig

    calls = []
    for name in ("add", "scale_"):
        real = getattr(elementwise_kernel, name)
        monkeypatch.setattr(elementwise_kernel, name, lambda *a, n=name, r=real: calls.append(n) or r(*a))
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False, device="cuda", dtype=torch.bfloat16)
    optimizer, exact = Optimizer(head, OptimizerConfig()), torch.zeros(500, 64, device="cuda")
    for _ in range(3):
        hidden, labels = torch.randn(40, 64, device="cuda").bfloat16(), torch.randint(0, 500, (40,))
        (linear_cross_entropy(hidden, head.weight, labels) / 40).backward()
        weight = head.weight.detach().float().requires_grad_()
        loss = torch.nn.functional.cross_entropy(hidden.float() @ weight.t(), labels.cuda())
        exact += torch.autograd.grad(loss, weight)[0]
    assert calls == ["scale_", "scale_", "add", "scale_", "add"]
    found = optimizer.gradients()["weight"]
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-2 * exact.norm()


if __name__ == "__main__":
    sums()
    multiples()
