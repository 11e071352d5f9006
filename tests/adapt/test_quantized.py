"""Every method on a quantized base: as on a plain one that holds the same values."""

import pytest
import torch

from ropewalk.adapt import AdapterConfig, adapter_parameters, apply_adapter, merge, quantize_base, unmerged
from ropewalk.errors import UserError
from ropewalk.model import save_model
from ropewalk.ops import QUANTIZED, QuantizedTensor


@pytest.fixture(params=QUANTIZED)
def kind(request):
    return request.param


METHODS = ("lora", "dora", "ia3", "bottleneck", "prompt", "prefix")


@torch.no_grad()
def logits(model, tokens):
    return model.logits(model(tokens))


def quantized_weights(model):
    return [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]


def rounded(tiny, kind, dtype="float32"):
    """A model with plain weights that the kind holds exactly, as far as anything can."""
    model = tiny.ours(dtype).requires_grad_(False)
    quantize_base(model, kind=kind)
    merge(model)
    return model


def pair(tiny, kind, method, dtype="float32"):
    """The same adapter, away from where it begins, on a quantized base and on a plain one of its values."""
    models = tiny.ours(dtype).requires_grad_(False), rounded(tiny, kind, dtype)
    quantize_base(models[0], kind=kind)
    for model in models:
        apply_adapter(model, AdapterConfig(method, rank=3, tokens=3))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in adapter_parameters(model).values():
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3)
    return models


def test_all_frozen_linear_weights_of_the_blocks_but_routers(tiny_model):
    model = tiny_model("qwen3_moe").ours()
    assert quantize_base(model) == []  # all are trained
    model.requires_grad_(False)
    names = quantize_base(model)
    assert quantized_weights(model) == [f"{name}.weight" for name in names]
    linear = [n for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)]
    assert set(linear) - set(names) == {"blocks.0.mlp.router"}
    assert quantize_base(model) == []
    some = tiny_model("llama").ours().requires_grad_(False)
    assert quantize_base(some, ["blocks.1.mlp.up_proj"]) == ["blocks.1.mlp.up_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_equal_those_of_the_dequantized_base(llama, kind, method):
    quantized, plain = pair(llama, kind, method)
    for model in (quantized, plain):
        model.train()(llama.tokens()).square().sum().backward()
    torch.testing.assert_close(logits(quantized, llama.tokens()), logits(plain, llama.tokens()))
    grads = [{n: p.grad for n, p in adapter_parameters(m).items()} for m in (quantized, plain)]
    for name, found in grads[0].items():
        torch.testing.assert_close(found, grads[1][name], rtol=1e-4, atol=1e-4, msg=name)
    assert all(p.grad is None for n, p in quantized.named_parameters() if n not in grads[0])


def test_quantizing_after_adapting_is_the_same(llama, kind):
    one, other = llama.ours().requires_grad_(False), llama.ours()
    quantize_base(one, kind=kind)
    apply_adapter(one, AdapterConfig(rank=3))
    apply_adapter(other, AdapterConfig(rank=3))
    quantize_base(other, kind=kind)
    assert quantized_weights(one) == quantized_weights(other)
    assert torch.equal(logits(one, llama.tokens()), logits(other, llama.tokens()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_into_plain_weights(llama, tmp_path, kind, method, dtype):
    quantized, plain = pair(llama, kind, method, dtype)
    assert merge(quantized) == merge(plain) == []
    assert quantized_weights(quantized) == []
    assert all(p.requires_grad for p in quantized.parameters())
    for (name, p), q in zip(quantized.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == getattr(torch, dtype)
        torch.testing.assert_close(p, q, msg=name)
    save_model(quantized, None, tmp_path / "a")


def test_merged_and_requantized(llama, kind):
    """Each adapted layer is the merged one, rounded once more; the others keep their bits."""
    quantized, merged = (pair(llama, kind, "ia3")[0] for _ in range(2))
    merge(merged)
    assert merge(quantized, requantize=True) == unmerged(quantized) == []
    names = quantized_weights(quantized)
    assert len(names) == 14
    for name in names:
        held, expected = quantized.get_parameter(name), merged.get_parameter(name)
        assert isinstance(held, QUANTIZED[kind])
        assert not held.requires_grad
        if any(place in name for place in ("k_proj", "v_proj", "down_proj")):
            expected = QUANTIZED[kind].quantize(expected).dequantize()
        torch.testing.assert_close(held.dequantize(), expected.detach())


def test_generation_one_row_at_a_time(llama, kind):
    """The matrix-vector path of plain bfloat16 weights is not taken for quantized ones."""
    quantized, plain = pair(llama, kind, "lora", "bfloat16")
    token = llama.tokens()[:1, :1]
    torch.testing.assert_close(logits(quantized, token), logits(plain, token), rtol=0.02, atol=0.05)


def test_a_kind_that_there_is_not_is_said():
    with pytest.raises(UserError, match="kind nf8: one of nf4, int8"):
        quantize_base(torch.nn.Module(), kind="nf8")
