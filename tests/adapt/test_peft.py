"""Adapters go to peft and come from peft with the same logits, in every family."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file

from ropewalk.adapt import AdapterConfig, adapter_parameters, apply_adapter, load_adapter, merge, save_adapter
from ropewalk.model import load_model, save_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def logits(model, tokens):
    return model.logits(model(tokens))


@torch.no_grad()
def peft_logits(tiny, path):
    return peft.PeftModel.from_pretrained(tiny.theirs(), path).eval()(tiny.tokens()).logits


def close(a, b, tolerance=1e-4):
    assert (a - b).abs().max().item() < tolerance


def same_files(one, other):
    for a, b in ((one, other), (other, one)):
        mine, theirs = (load_file(x / "adapter_model.safetensors") for x in (a, b))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (one / "adapter_config.json").read_text() == (other / "adapter_config.json").read_text()


@pytest.mark.parametrize("targets", ["all-linear", ATTENTION, ("q_proj", "down_proj"), ("v_proj",)])
def test_ours_in_peft_and_back(tiny, tmp_path, targets):
    """What we save gives peft the same logits; loaded here again it is the same adapter, file for file."""
    model = tiny.ours()
    if targets[-1] == "down_proj" and model.config.moe_layers:
        targets = ("q_proj",)
    apply_adapter(model, AdapterConfig("lora", rank=3, alpha=5.0, targets=targets))
    base = logits(model, tiny.tokens())
    randomize(model)
    adapted = logits(model, tiny.tokens())
    assert (adapted - base).abs().max() > 0.1
    save_adapter(model, tmp_path / "a", str(tiny.path))
    close(peft_logits(tiny, tmp_path / "a"), adapted)
    again = tiny.ours()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, tiny.tokens()), adapted)
    save_adapter(again, tmp_path / "b", str(tiny.path))
    same_files(tmp_path / "a", tmp_path / "b")


def peft_adapter(tiny, path, **changes):
    """An adapter as peft makes it on the transformers model, with every number random."""
    targets = list(ATTENTION) if tiny.family in ("mixtral", "qwen3_moe") else "all-linear"
    arguments = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | changes
    model = peft.get_peft_model(tiny.theirs(), peft.LoraConfig(**arguments))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 9, "o_proj": 1}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_theirs_here(tiny, tmp_path, changes):
    peft_adapter(tiny, tmp_path / "a", **changes)
    model = tiny.ours()
    before = logits(model, tiny.tokens())
    names = load_adapter(model, tmp_path / "a")
    assert len(names) >= 8
    adapted = logits(model, tiny.tokens())
    assert (adapted - before).abs().max() > 0.1
    close(adapted, peft_logits(tiny, tmp_path / "a"))
    save_adapter(model, tmp_path / "b", str(tiny.path))
    close(adapted, peft_logits(tiny, tmp_path / "b"))


def test_merged_equals_adapted_and_transformers_reads_it(tiny, tmp_path):
    model = tiny.ours()
    apply_adapter(model, AdapterConfig("lora", rank=3, alpha=5.0))
    randomize(model)
    adapted = logits(model, tiny.tokens())
    merge(model)
    merged = logits(model, tiny.tokens())
    scale = max(1.0, adapted.abs().max().item())
    close(merged, adapted, 1e-5 * scale)
    save_model(model, None, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    close(theirs(tiny.tokens()).logits, merged)


def test_load_model_merges_an_adapter_directory(llama, tmp_path):
    model = llama.ours()
    apply_adapter(model, AdapterConfig("lora", rank=3, alpha=5.0))
    randomize(model)
    save_adapter(model, tmp_path / "a", str(llama.path))
    merged = load_model(tmp_path / "a")
    close(logits(merged, llama.tokens()), logits(model, llama.tokens()), 1e-5)


def test_bfloat16_adapters_keep_their_bits(llama, tmp_path):
    model = llama.ours("bfloat16")
    apply_adapter(model, AdapterConfig("lora", rank=3))
    randomize(model)
    save_adapter(model, tmp_path / "a", "base")
    again = llama.ours("bfloat16")
    load_adapter(again, tmp_path / "a")
    for name, value in adapter_parameters(again).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, adapter_parameters(model)[name])


def test_an_untrained_adapter_of_a_fused_family_comes_back(tiny_model, tmp_path):
    """B is all zero: nothing tells the parts of the fused matrix apart."""
    phi3 = tiny_model("phi3")
    model = phi3.ours()
    apply_adapter(model, AdapterConfig("lora", rank=3))
    save_adapter(model, tmp_path / "a", "base")
    again = phi3.ours()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, phi3.tokens()), logits(model, phi3.tokens()))
    close(peft_logits(phi3, tmp_path / "a"), logits(model, phi3.tokens()))


def test_what_the_config_says(tiny_model, tmp_path):
    """Names are the shortest that PEFT cannot mistake; fused matrices have the sums of ranks and alphas."""
    model = tiny_model("phi3").ours()
    apply_adapter(
        model, AdapterConfig("lora", rank=2, alpha=8.0, dropout=0.1, targets=("q_proj", "v_proj", "o_proj"))
    )
    save_adapter(model, tmp_path / "a", "org/name", revision="abc")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "qkv_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8, 0.1)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 4}, {"qkv_proj": 16})
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "abc")
    model = tiny_model("gpt2").ours()
    apply_adapter(model, AdapterConfig("lora", rank=2, targets=("blocks.0.attention.o_proj", "down_proj")))
    save_adapter(model, tmp_path / "b", "base")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0.attn.c_proj", "mlp.c_proj"]
    assert config["fan_in_fan_out"] is True


def test_saving_is_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    from ropewalk.errors import RopewalkError, UserError

    model = llama.ours()
    with pytest.raises(RopewalkError, match="no adapter to save"):
        save_adapter(model, tmp_path / "a", "base")
    apply_adapter(model, AdapterConfig("lora", rank=2))
    save_adapter(model, tmp_path / "a", "base")
    with pytest.raises(UserError, match="already exists"):
        save_adapter(model, tmp_path / "a", "base")
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(model, tmp_path / "a", "base")
    assert list(tmp_path.iterdir()) == []
