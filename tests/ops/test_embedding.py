"""Embeddings are torch's; their gradient is the exact one, rounded once, however often a token comes."""

import pytest
import torch
import torch.nn.functional as F

from ropewalk.ops.embedding import Embedding, embedding


def gradient(function, tokens, weight, slope):
    weight = weight.detach().requires_grad_()
    out = function(tokens, weight)
    return out.detach(), torch.autograd.grad(out, weight, slope.to(weight.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 512), (1, 3), (2000,), (2, 0)])
def test_the_gradient_is_the_exact_one_rounded_once(dtype, shape):
    """Half of the tokens are one, whose gradients point one way; rows of others and unused rows, too."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, shape)
    tokens[torch.rand(shape) < 0.5] = 7
    weight = torch.randn(60, 24).to(dtype)
    slope = (torch.randn(*shape, 24) + 0.5).to(dtype)
    out, found = gradient(embedding, tokens, weight, slope)
    expected, exact = gradient(F.embedding, tokens, weight.double(), slope)
    assert torch.equal(out.double(), expected)
    assert found.dtype == dtype
    precision = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=precision, atol=precision * 1e-3)


def test_a_common_tokens_gradient_does_not_stop_growing():
    """torch's on a CPU does: 1,000 ones are 256."""
    table = Embedding(10, 4, dtype=torch.bfloat16)
    table(torch.zeros(1000, dtype=torch.long)).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[0].tolist() == [1000.0] * 4
