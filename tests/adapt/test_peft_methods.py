"""DoRA, rsLoRA, (IA)^3, prompt and prefix tuning: to peft and from peft with the same logits."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from ropewalk.adapt import AdapterConfig, adapter_parameters, apply_adapter, load_adapter, save_adapter
from ropewalk.model import load_model

CONFIGS = {
    "dora": AdapterConfig("dora", rank=3, alpha=5.0),
    "dora-in-part": AdapterConfig("dora", rank=3, alpha=5.0, targets=("q_proj", "o_proj")),
    "rslora": AdapterConfig("lora", rank=3, alpha=5.0, rank_stabilized=True),
    "ia3": AdapterConfig("ia3"),
    "ia3-all": AdapterConfig("ia3", targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "prompt": AdapterConfig("prompt", tokens=5),
    "prefix": AdapterConfig("prefix", tokens=5),
}


@torch.no_grad()
def disturb(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def logits(model, tokens):
    return model.logits(model(tokens))


@torch.no_grad()
def peft_logits(tiny, path):
    """Of the documents only: peft gives logits of a prompt's virtual tokens too."""
    model = peft.PeftModel.from_pretrained(tiny.theirs(), path).eval()
    return model(tiny.tokens()).logits[:, -tiny.tokens().shape[1] :]


def close(a, b, tolerance=2e-4):
    assert (a - b).abs().max().item() < tolerance


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ours_in_peft_and_back(tiny, tmp_path, config):
    """What we save gives peft the same logits; loaded here again it is the same adapter, file for file."""
    model = tiny.ours()
    base = logits(model, tiny.tokens())
    apply_adapter(model, config)
    disturb(model)
    adapted = logits(model, tiny.tokens())
    assert (adapted - base).abs().max() > 0.05
    save_adapter(model, tmp_path / "a", str(tiny.path))
    close(peft_logits(tiny, tmp_path / "a"), adapted)
    again = tiny.ours()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, tiny.tokens()), adapted)
    save_adapter(again, tmp_path / "b", str(tiny.path))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]


def theirs(tiny, method):
    """peft's config for a method; where its default targets are unknown for a family, or experts, ours."""
    experts = tiny.family in ("mixtral", "qwen3_moe")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if method == "dora":
        targets = attention if experts else "all-linear"
        return peft.LoraConfig(
            r=4, lora_alpha=6, use_dora=True, target_modules=targets, task_type="CAUSAL_LM"
        )
    if method == "ia3":
        arguments = {"target_modules": attention, "feedforward_modules": ["o_proj"]} if experts else {}
        if tiny.family in ("phi3", "olmo2"):
            both = {"phi3": ["qkv_proj", "down_proj"], "olmo2": ["k_proj", "v_proj", "down_proj"]}
            arguments = {"target_modules": both[tiny.family], "feedforward_modules": ["down_proj"]}
        return peft.IA3Config(task_type="CAUSAL_LM", **arguments)
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    return kind(num_virtual_tokens=4, task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", ["dora", "ia3", "prompt", "prefix"])
def test_theirs_here(tiny, tmp_path, method):
    """An adapter as peft makes it on the transformers model, with every number random."""
    model = peft.get_peft_model(tiny.theirs(), theirs(tiny, method))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "a")
    ours = tiny.ours()
    before = logits(ours, tiny.tokens())
    names = load_adapter(ours, tmp_path / "a")
    assert len(names) >= 4 or names == ["virtual_tokens"]
    adapted = logits(ours, tiny.tokens())
    assert (adapted - before).abs().max() > 0.05
    close(adapted, peft_logits(tiny, tmp_path / "a"))
    save_adapter(ours, tmp_path / "b", str(tiny.path))
    close(adapted, peft_logits(tiny, tmp_path / "b"))


def test_one_step_of_training_equals_peft(llama):
    """DoRA: same first values and batch, the same gradients."""
    ours, theirs = llama.ours(), llama.theirs()
    apply_adapter(ours, AdapterConfig("dora", rank=4, alpha=8.0, targets=("q_proj", "down_proj")))
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, config)
    disturb(ours)
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    names["magnitude"] = "lora_magnitude_vector.default.weight"
    their, pairs = dict(theirs.named_parameters()), []
    for name, parameter in adapter_parameters(ours).items():
        place, _, kind = name.rpartition(".")
        place = place.replace("blocks", "layers").replace("attention", "self_attn")
        pairs.append((name, parameter, their[f"base_model.model.model.{place}.{names[kind]}"]))
        pairs[-1][2].data.copy_(parameter.data)
    tokens = llama.tokens()
    ours.logits(ours(tokens)).logsumexp(-1).sum().backward()
    theirs(tokens).logits.logsumexp(-1).sum().backward()
    for name, one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_what_the_config_says(tiny_model, tmp_path):
    model = tiny_model("phi3").ours()
    apply_adapter(model, AdapterConfig("lora", rank=4, alpha=8.0, rank_stabilized=True))
    save_adapter(model, tmp_path / "a", "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"], config["r"], config["lora_alpha"]) == (
        True,
        False,
        4,
        8,
    )
    assert config["rank_pattern"] == {"qkv_proj": 12, "gate_up_proj": 8}
    assert config["alpha_pattern"]["qkv_proj"] == pytest.approx(8 * 3**0.5)
    model = tiny_model("gpt2").ours()
    apply_adapter(model, AdapterConfig("ia3"))
    save_adapter(model, tmp_path / "b", "base")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert config["feedforward_modules"] == ["mlp.c_proj"]
    model = tiny_model("qwen3").ours()
    apply_adapter(model, AdapterConfig("prefix", tokens=7))
    save_adapter(model, tmp_path / "c", "base")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["token_dim"], config["num_attention_heads"]) == (7, 12, 2)


@pytest.mark.parametrize("method", ["bottleneck", "dora", "prompt", "prefix", "ia3"])
def test_load_model_gives_what_was_trained(llama, tmp_path, method):
    """Merged where that can be, working beside the weights where not; bottlenecks in a format of ours."""
    model = llama.ours()
    apply_adapter(model, AdapterConfig(method, rank=3, tokens=3))
    disturb(model)
    save_adapter(model, tmp_path / "a", str(llama.path))
    loaded = load_model(tmp_path / "a")
    assert not loaded.training
    close(logits(loaded, llama.tokens()), logits(model, llama.tokens()), 1e-5)
    if method == "bottleneck":
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
        again = llama.ours()
        load_adapter(again, tmp_path / "a")
        assert all(torch.equal(p, adapter_parameters(model)[n]) for n, p in adapter_parameters(again).items())
