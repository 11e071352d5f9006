"""What all methods promise: they begin as nothing, freeze the rest, are seeded, and merge where they can."""

import pytest
import torch
from torch import nn

from ropewalk.adapt import (
    AdapterConfig,
    DoRALinear,
    adapter_parameters,
    apply_adapter,
    freeze,
    left_out,
    merge,
    rate_factors,
    unmerged,
)
from ropewalk.adapt.layers import BottleneckLinear, IA3Linear
from ropewalk.errors import UserError
from ropewalk.model import save_model

AT_REST = ("lora", "dora", "bottleneck", "ia3")
"""Methods that begin as the base model; virtual tokens are seen from the first."""


@torch.no_grad()
def disturb(model, seed=0, size=0.3):
    """Every adapter's parameter moved away from where it begins."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@torch.no_grad()
def logits(model, tokens):
    return model.logits(model(tokens))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig("lora", rank=0), "adapt.rank is 0"),
        (AdapterConfig("prompt", tokens=1 << 20), "adapt.tokens is 1048576"),
        (AdapterConfig("prefix", tokens=0), "adapt.tokens is 0"),
    ],
)
def test_sizes_that_a_model_has_no_room_for_are_refused(tiny, config, message):
    with pytest.raises(UserError, match=message):
        apply_adapter(tiny.ours(), config)


@pytest.mark.parametrize("method", AT_REST)
def test_it_begins_as_the_base_model_and_trains_nothing_else(tiny, method):
    model = tiny.ours()
    before = logits(model, tiny.tokens())
    names = apply_adapter(model, AdapterConfig(method, rank=3))
    torch.testing.assert_close(logits(model, tiny.tokens()), before, rtol=0, atol=1e-5)
    assert names == unmerged(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    model.train()(tiny.tokens()).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert any(adapter_parameters(model)[name].grad.any() for name in trained)


@pytest.mark.parametrize("method", AT_REST)
def test_in_bfloat16_too(llama, method):
    """DoRA's factor is exactly 1, also where lengths are rounded to 8 bits."""
    model = llama.ours("bfloat16")
    before = logits(model, llama.tokens())
    apply_adapter(model, AdapterConfig(method))
    torch.testing.assert_close(logits(model, llama.tokens()), before, rtol=0, atol=0.05)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [*AT_REST, "prompt", "prefix"])
def test_first_values_follow_the_seed(llama, method):
    def first(seed):
        model = llama.ours()
        apply_adapter(model, AdapterConfig(method, tokens=3), seed)
        return adapter_parameters(model)

    one, again, other = first(1), first(1), first(2)
    assert one
    assert all(torch.equal(one[name], again[name]) for name in one)
    if method != "ia3":  # ones
        assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "method", "places"),
    [
        ("llama", "ia3", ["attention.k_proj", "attention.v_proj", "mlp.down_proj"]),
        ("llama", "bottleneck", ["attention.o_proj", "mlp.down_proj"]),
        ("mixtral", "ia3", ["attention.k_proj", "attention.v_proj"]),
        ("gpt2", "ia3", ["attention.k_proj", "attention.v_proj", "mlp.down_proj"]),
    ],
)
def test_places_of_the_papers(tiny_model, family, method, places):
    model = tiny_model(family).ours()
    names = apply_adapter(model, AdapterConfig(method))
    assert names == [f"blocks.{i}.{place}" for i in range(2) for place in places]


def test_targets_choose_places(llama):
    model = llama.ours()
    names = apply_adapter(model, AdapterConfig("bottleneck", targets=("up_proj",)))
    assert names == ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_equals_its_formula(dropout):
    """Values, and gradients with the lengths taken as constants, in float64."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(20, 12).double(), 3, 6.0, dropout)
    nn.init.normal_(layer.lora_b)
    nn.init.normal_(layer.magnitude)
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = layer(x)
    names = ["x", *dict(layer.named_parameters(recurse=False))]
    inputs = [x, *layer.parameters(recurse=False)]
    found = torch.autograd.grad(out.square().sum(), inputs)

    weight, bias = layer.base.weight, layer.base.bias
    update = 2 * layer.lora_b @ layer.lora_a
    factor = layer.magnitude / (weight + update).norm(dim=1).detach()
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, dropout)
    expected = x @ weight.T + bias + dropped @ (factor[:, None] * (weight + update) - weight).T
    torch.testing.assert_close(out, expected)
    for name, a, b in zip(names, found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_dora_lengths_need_nothing_of_the_weights_size():
    layer = DoRALinear(nn.Linear(40, 30).double(), 3, 6.0)
    nn.init.normal_(layer.lora_b)
    expected = (layer.base.weight + 2 * layer.lora_b @ layer.lora_a).norm(dim=1)
    torch.testing.assert_close(layer.lengths(), expected.detach())


def test_rank_stabilized_scale(llama):
    one, other = llama.ours(), llama.ours()
    apply_adapter(one, AdapterConfig("lora", rank=4, alpha=8.0, rank_stabilized=True))
    apply_adapter(other, AdapterConfig("lora", rank=4, alpha=16.0))
    for model in (one, other):
        disturb(model)
    torch.testing.assert_close(logits(one, llama.tokens()), logits(other, llama.tokens()))


def test_ia3_and_bottleneck_equal_their_formulas():
    base = nn.Linear(20, 12).double()
    x = torch.randn(7, 20, dtype=torch.float64)
    outputs, inputs = IA3Linear(base, on_input=False), IA3Linear(base, on_input=True)
    small = BottleneckLinear(base, 3)
    for parameter in (outputs.vector, inputs.vector, *small.parameters(recurse=False)):
        nn.init.normal_(parameter)
    torch.testing.assert_close(outputs(x), base(x) * outputs.vector)
    torch.testing.assert_close(inputs(x), base(x * inputs.vector))
    for layer in (outputs, inputs):  # the bias is scaled with the outputs, and not with the inputs
        before = layer(x)
        torch.testing.assert_close(layer.merged()(x), before)
    y = base(x)
    inside = nn.functional.gelu(y @ small.down.T + small.down_bias)
    torch.testing.assert_close(small(x), y + inside @ small.up.T + small.up_bias)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_equals_adapted_and_is_a_plain_model(tiny, tmp_path, method):
    model = tiny.ours()
    apply_adapter(model, AdapterConfig(method, rank=3, alpha=5.0))
    disturb(model)
    adapted = logits(model, tiny.tokens())
    assert merge(model) == []
    scale = max(1.0, adapted.abs().max().item())
    torch.testing.assert_close(logits(model, tiny.tokens()), adapted, rtol=0, atol=2e-5 * scale)
    assert all(p.requires_grad for p in model.parameters())
    save_model(model, None, tmp_path / "merged")


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix"])
def test_what_cannot_be_merged_stays_and_says_so(llama, method):
    model = llama.ours()
    names = apply_adapter(model, AdapterConfig(method, rank=3, tokens=3))
    disturb(model)
    adapted = logits(model, llama.tokens()) if method == "bottleneck" else None
    assert merge(model) == names == unmerged(model)
    if adapted is not None:
        assert torch.equal(logits(model, llama.tokens()), adapted)
    with pytest.raises(UserError, match="carries adapters already"):
        apply_adapter(model, AdapterConfig())


def test_bitfit_trains_all_biases_and_nothing_else(tiny_model):
    model = tiny_model("qwen2").ours()
    names = apply_adapter(model, AdapterConfig("bitfit"))
    leaves = [f"blocks.{i}.attention.{n}_proj.bias" for i in range(2) for n in "qkv"]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad] == leaves
    assert (unmerged(model), adapter_parameters(model), left_out(model)) == ([], {}, None)
    norms = [n for n in apply_adapter(tiny_model("gpt2").ours(), AdapterConfig("bitfit")) if "norm" in n]
    assert len(norms) == 5
    with pytest.raises(UserError, match="this llama model has none"):
        apply_adapter(tiny_model("llama").ours(), AdapterConfig("bitfit"))


def test_rate_factors_are_for_b(llama):
    model = llama.ours()
    apply_adapter(model, AdapterConfig("lora", targets=("q_proj",)))
    assert rate_factors(model, 16.0) == {f"blocks.{i}.attention.q_proj.lora_b": 16.0 for i in range(2)}


@pytest.mark.parametrize(
    ("family", "patterns", "left"),
    [
        ("llama", ["*_proj.weight", "embed*", "head*"], ["norm", "attention_norm", "mlp_norm"]),
        (
            "phi3",
            ["*qkv_proj*", "*norm*", "lm_head.weight", "model.embed*"],
            ["o_proj", "gate", "up", "down"],
        ),
        ("llama", ["model.layers.[0-9]*", "embed.weight", "norm.weight"], ["head"]),
    ],
)
def test_freezing_by_names_here_or_in_hugging_face_files(tiny_model, family, patterns, left):
    model = tiny_model(family).ours()
    frozen = freeze(model, patterns)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(frozen) | set(trained) == {name for name, _ in model.named_parameters()}
    assert trained
    assert all(any(part in name for part in left) for name in trained)
    assert all(any(part in name for name in trained) for part in left)


def test_freezing_what_is_not_there_or_everything_is_refused(llama):
    model = llama.ours()
    with pytest.raises(UserError, match=r"no parameter is named 'transformer\.h\.\*'; a llama model has"):
        freeze(model, ["transformer.h.*"])
    with pytest.raises(UserError, match="nothing to train"):
        freeze(model, ["*"])
    assert all(p.requires_grad for p in model.parameters())
