"""Gradients of all that is trained, in bfloat16 over many tokens, are those of float64 but for roundings.

Text is as unequal as language: the commonest token is every seventh. What sums gradients in bfloat16 is then
tens of percent off, without any loss to show it.
"""

import copy
from dataclasses import replace

import pytest
import torch

from ropewalk.adapt import AdapterConfig, apply_adapter
from ropewalk.data import Batch
from ropewalk.model import from_config
from ropewalk.model.config import ModelConfig
from ropewalk.train.objective import loss_sum

TOKENS, VOCABULARY = 4096, 512
LLAMA = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=TOKENS,
    tie_word_embeddings=True,
)
GPT2 = replace(
    LLAMA,
    norm="layer",
    position="learned",
    mlp_gated=False,
    hidden_act="gelu_new",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    num_key_value_heads=4,
)
SHAPES = {
    "llama": LLAMA,
    "untied, norms of heads": replace(LLAMA, tie_word_embeddings=False, qk_norm="head"),
    "gpt2": GPT2,
    "gpt_neox": replace(GPT2, position="rope", parallel_residual=True, partial_rotary_factor=0.25),
    "gemma": replace(LLAMA, norm="rms_plus_one", norm_placement="sandwich", scale_embeddings=True),
}
METHODS = ("lora", "dora", "prefix", "prompt", "ia3", "bottleneck")


def batch() -> Batch:
    """One row of documents of 10 to 250 tokens."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, VOCABULARY + 1).float()
    tokens = torch.multinomial(share, TOKENS, replacement=True, generator=generator)[None]
    starts = torch.randint(10, 250, (TOKENS // 10,), generator=generator).cumsum(0)
    segments = torch.bucketize(torch.arange(TOKENS), starts, right=True)[None]
    first = torch.cat((torch.zeros(1, dtype=torch.long), starts))
    positions = torch.arange(TOKENS)[None] - first[segments]
    return Batch(tokens, tokens.roll(-1, 1), positions, segments)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    (loss_sum(model, batch(), 512) / TOKENS).backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
@pytest.mark.parametrize(
    ("shape", "method"), [*((shape, "full") for shape in SHAPES), *(("llama", method) for method in METHODS)]
)
def test_they_are_those_of_float64(shape: str, method: str, device: str) -> None:
    model = from_config(SHAPES[shape], seed=0).bfloat16()
    if method != "full":
        apply_adapter(model, AdapterConfig(method, 8, 16.0, 0.0, "all-linear", False, 20), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    exact = gradients(copy.deepcopy(model.train()).double())
    found = gradients(model.to(device))
    whole = max(float(gradient.norm()) for gradient in exact.values())
    errors = {
        name: float((found[name] - right).norm() / right.norm())
        for name, right in exact.items()
        if right.norm() > 1e-9 * whole  # a key's bias has none: softmax does not see it
    }
    assert len(errors) >= 1
    assert {name: error for name, error in errors.items() if error > 0.03} == {}
