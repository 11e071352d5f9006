"""Adapters begin as nothing, freeze the rest, are chosen by name and learn as PEFT's do."""

import pytest
import torch
from torch import nn

from ropewalk.adapt import (
    AdapterConfig,
    LoRALinear,
    adapter_parameters,
    apply_adapter,
    left_out,
    merge,
    unmerged,
)
from ropewalk.errors import UserError
from ropewalk.ops import linear_cross_entropy
from ropewalk.train.activations import save_activations

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_new_adapter_changes_nothing_and_freezes_the_rest(tiny):
    model = tiny.ours()
    before = model(tiny.tokens())
    names = apply_adapter(model, AdapterConfig("lora", rank=3))
    assert torch.equal(model(tiny.tokens()), before)
    assert names == unmerged(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    assert len(trained) == 2 * len(names)
    assert not any(part in name for name in names for part in ("head", "embed", "router", "experts"))


def test_all_linear_is_every_linear_layer_in_the_blocks_and_attention_beside_experts(tiny_model):
    names = apply_adapter(tiny_model("llama").ours(), AdapterConfig())
    leaves = [*(f"attention.{n}" for n in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == [f"blocks.{i}.{leaf}" for i in range(2) for leaf in leaves]
    model = tiny_model("qwen3_moe").ours()
    assert left_out(model) is None
    names = apply_adapter(model, AdapterConfig())
    assert "16 matrices of experts, routers and MLPs are not adapted" in left_out(model)
    assert names == [f"blocks.{i}.attention.{n}" for i in range(2) for n in ATTENTION]
    assert left_out(tiny_model("llama").ours()) is None


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", ("q_proj", "down_proj"), ["attention.q_proj", "mlp.down_proj"]),
        ("llama", ("self_attn.q_proj",), ["attention.q_proj"]),
        ("phi3", ("qkv_proj",), ["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
        ("phi3", ("gate_up_proj",), ["mlp.gate_proj", "mlp.up_proj"]),
        ("gpt2", ("c_attn",), ["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
        ("gpt2", ("c_proj",), ["attention.o_proj", "mlp.down_proj"]),
        ("gpt2", ("attn.c_proj", "c_fc"), ["attention.o_proj", "mlp.up_proj"]),
        ("gpt_neox", ("query_key_value", "dense"), [f"attention.{n}" for n in ATTENTION]),
    ],
)
def test_targets_are_names_here_or_in_hugging_face_files(tiny_model, family, targets, expected):
    names = apply_adapter(tiny_model(family).ours(), AdapterConfig("lora", targets=targets))
    assert names == [f"blocks.{i}.{leaf}" for i in range(2) for leaf in expected]


def test_one_layer_of_one_block(llama):
    assert apply_adapter(llama.ours(), AdapterConfig("lora", targets=("blocks.1.attention.q_proj",))) == [
        "blocks.1.attention.q_proj"
    ]


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "llama",
            ("q_proj", "qproj"),
            r"no linear layer 'qproj'; this llama model has q_proj, .*down_proj; or",
        ),
        ("phi3", ("nothing",), r"has q_proj, .*qkv_proj, .*gate_up_proj"),
        ("llama", ("proj",), "no linear layer 'proj'"),
        ("llama", ("head",), r"'head' \(head\) cannot carry an adapter"),
        ("mixtral", ("router",), r"'router' \(blocks.0.mlp.router\) cannot carry"),
        ("mixtral", ("gate_proj",), r"\(blocks.0.mlp.experts.0.gate_proj\) cannot carry"),
        ("llama", (), "targets is empty"),
    ],
)
def test_an_unknown_target_is_an_error_that_lists_what_there_is(tiny_model, family, targets, message):
    model = tiny_model(family).ours()
    with pytest.raises(UserError, match=message):
        apply_adapter(model, AdapterConfig("lora", targets=targets))
    assert not unmerged(model)


def test_a_second_adapter_is_refused(llama):
    model = llama.ours()
    apply_adapter(model, AdapterConfig("lora", targets=("q_proj",)))
    with pytest.raises(UserError, match="carries adapters already"):
        apply_adapter(model, AdapterConfig("lora", targets=("v_proj",)))


def test_first_values_follow_the_seed_and_pefts_distribution(llama):
    def first(seed):
        model = llama.ours()
        apply_adapter(model, AdapterConfig("lora", rank=64), seed)
        return adapter_parameters(model)

    one, again, other = first(1), first(1), first(2)
    name = "blocks.0.attention.q_proj.lora_a"
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["blocks.0.attention.k_proj.lora_a"])
    bound = 24**-0.5
    assert one[name].abs().max() <= bound
    expected = nn.init.kaiming_uniform_(torch.empty(64, 24), a=5**0.5).std()
    torch.testing.assert_close(one[name].std(), expected, rtol=0.05, atol=0)


def test_one_step_of_training_equals_peft(llama):
    """Same first values, same batch, same optimizer: the same adapter after three steps."""
    import peft

    ours, theirs = llama.ours(), llama.theirs()
    apply_adapter(ours, AdapterConfig("lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, config)
    mine = adapter_parameters(ours)
    their = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = {}
    for name in mine:
        parts = name.split(".")
        room = "self_attn" if parts[2] == "attention" else "mlp"
        kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[parts[4]]
        pairs[name] = their[
            f"base_model.model.model.layers.{parts[1]}.{room}.{parts[3]}.{kind}.default.weight"
        ]
        pairs[name].data.copy_(mine[name].data)
    assert len(pairs) == len(their)
    optimizers = [torch.optim.AdamW(p.values(), lr=0.01) for p in (mine, their)]
    tokens = llama.tokens()
    labels = tokens.roll(-1, 1)
    for _ in range(3):
        loss = (
            linear_cross_entropy(ours(tokens).flatten(0, 1), ours.output_weight, labels.flatten())
            / labels.numel()
        )
        their_loss = nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
        for optimizer, value in zip(optimizers, (loss, their_loss), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for name in mine:
        torch.testing.assert_close(mine[name], pairs[name], rtol=1e-3, atol=1e-4)


def test_only_adapters_get_gradients(llama):
    model = llama.ours().train()
    apply_adapter(model, AdapterConfig("lora", rank=2))
    tokens = llama.tokens()
    for checkpointing in (False, True):
        save_activations(model, "full" if checkpointing else "none")
        model(tokens).square().mean().backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == set(adapter_parameters(model))
        model.zero_grad()


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    base = nn.Linear(40, 30)
    layer = LoRALinear(base, 4, 8.0, dropout=0.5)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(200, 40)
    layer.eval()
    expected = base(x) + 2 * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(dropped, base(x) + 2 * kept @ layer.lora_a.T @ layer.lora_b.T)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_adds_in_float32_and_rounds_once(dtype):
    base = nn.Linear(40, 30).to(dtype)
    layer = LoRALinear(base, 4, 8.0)
    nn.init.normal_(layer.lora_b)
    wide = base.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()
    merged = layer.merged()
    assert isinstance(merged, nn.Linear)
    expected = wide.to(dtype)
    close = (merged.weight - expected).abs() <= torch.finfo(torch.float32).eps * 40 * wide.abs().max()
    same = merged.weight == expected
    assert same.float().mean() > 0.99 if dtype == torch.bfloat16 else close.all()


def test_merge_leaves_a_plain_trainable_model(llama):
    model = llama.ours()
    keys = list(model.state_dict())
    apply_adapter(model, AdapterConfig("lora", rank=2))
    merge(model)
    assert list(model.state_dict()) == keys
    assert unmerged(model) == []
    assert all(p.requires_grad for p in model.parameters())
    apply_adapter(model, AdapterConfig("lora", rank=2))  # and can be adapted again
