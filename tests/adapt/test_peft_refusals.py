"""An adapter directory is untrusted: what is unsupported, damaged or does not fit is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropewalk.adapt import AdapterConfig, apply_adapter, load_adapter, save_adapter, unmerged
from ropewalk.errors import UserError

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(llama, tmp_path):
    model = llama.ours()
    apply_adapter(model, AdapterConfig("lora", rank=2, targets=("q_proj", "v_proj")))
    save_adapter(model, tmp_path / "a", "base")
    return tmp_path / "a"


def refused(llama, path, message):
    model = llama.ours()
    with pytest.raises(UserError, match=message) as error:
        load_adapter(model, path)
    assert str(path) in str(error.value)
    assert unmerged(model) == []


def change(path, **fields):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(path, **tensors):
    file = path / "adapter_model.safetensors"
    kept = {name: value for name, value in (load_file(file) | tensors).items() if value is not None}
    save_file(kept, file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; those that can be loaded are LORA, IA3"),
        ({"peft_type": "IA3"}, "r is not supported"),
        ({"peft_type": []}, r"peft_type is \[\]"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "not its other half, .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is not supported.*lm_head"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"of_next_year": {"a": 1}}, "of_next_year is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*changed the base"),
        ({"r": 3}, "has rank 2; adapter_config.json says 3"),
        ({"r": 0}, "whole numbers"),
        ({"r": "2"}, "whole numbers"),
        ({"r": True}, "whole numbers"),
        ({"rank_pattern": {"q_proj": 1 << 40}}, "whole numbers"),
        ({"rank_pattern": {"(a+)+$": 2}}, "plain module names"),
        ({"rank_pattern": [1]}, "no JSON object"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"lora_alpha": 1e308}, "finite"),
        ({"alpha_pattern": {"q_proj": "x"}}, "finite"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_config_that_is_not_understood(llama, adapter, fields, message):
    change(adapter, **fields)
    refused(llama, adapter, message)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_config_that_is_no_json_object(llama, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    refused(llama, adapter, "not valid JSON|not a JSON object")


def test_pickled_weights(llama, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(llama, adapter, r"no adapter_model.safetensors; a pickled one \(.bin\) can run code")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: torch.ones(2, 23)}, r"q_proj has shapes \(2, 23\) and \(24, 2\); .* \(r, 24\) and \(24, r\)"),
        ({NAME: torch.ones(3, 24)}, "q_proj has shapes"),
        ({NAME: torch.ones(2, 24, 1)}, "no matrix of floating-point"),
        ({NAME: torch.ones(2, 24, dtype=torch.int8)}, "no matrix of floating-point"),
        ({NAME: torch.full((2, 24), float("nan"))}, "q_proj.lora_A.weight holds NaN"),
        ({NAME: None}, "not its other half"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 24)}, "lm_head.* is no adapter of"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}, "is no adapter of"),
        ({NAME.replace("layers.0", "layers.2"): torch.ones(2, 24)}, "layers.2.* is no adapter of"),
        ({NAME.replace("_A.weight", "_magnitude_vector"): torch.ones(2)}, "magnitude_vector"),
    ],
)
def test_tensors_that_do_not_fit(llama, adapter, tensors, message):
    rewrite(adapter, **tensors)
    refused(llama, adapter, message)


def test_no_tensors(llama, adapter):
    save_file({}, adapter / "adapter_model.safetensors")
    refused(llama, adapter, "holds no adapters")


def test_truncated_file(llama, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(llama, adapter, "truncated: 10 of")


def test_adapter_of_another_family(tiny_model, adapter):
    refused(tiny_model("gpt2"), adapter, "no adapter of a linear layer in the blocks of this gpt2 model")


def test_loading_onto_adapters_is_refused(llama, adapter):
    model = llama.ours()
    load_adapter(model, adapter)
    with pytest.raises(UserError, match="carries adapters already"):
        load_adapter(model, adapter)


OTHERS = {
    "dora": AdapterConfig("dora", rank=2, targets=("q_proj",)),
    "ia3": AdapterConfig("ia3"),
    "bottleneck": AdapterConfig("bottleneck", rank=2),
    "prompt": AdapterConfig("prompt", tokens=3),
    "prefix": AdapterConfig("prefix", tokens=3),
}
PROJECTION = "base_model.model.model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("method", "fields", "tensors", "message"),
    [
        ("dora", {"use_dora": False}, {}, "magnitude_vector' is no adapter"),
        ("dora", {}, {f"{PROJECTION}.q_proj.lora_magnitude_vector": torch.ones(23)}, r"shape \(24,\)"),
        ("dora", {}, {f"{PROJECTION}.q_proj.lora_magnitude_vector": torch.full((24,), float("inf"))}, "NaN"),
        ("ia3", {"modules_to_save": ["lm_head"]}, {}, "modules_to_save is not supported"),
        ("ia3", {}, {f"{PROJECTION}.k_proj.ia3_l": torch.ones(9, 1)}, r"must be .* shape \(8, 1\)"),
        ("ia3", {}, {f"{PROJECTION}.k_proj.ia3_l": torch.ones(8)}, r"must be .* shape \(8, 1\)"),
        ("ia3", {}, {"base_model.model.lm_head.ia3_l": torch.ones(37, 1)}, "lm_head.ia3_l' is no adapter"),
        ("bottleneck", {"width": 3}, {}, r"must be .* shape \(3, 24\)"),
        ("bottleneck", {"width": 1 << 40}, {}, "width must be a whole number"),
        ("bottleneck", {"dropout": -1}, {}, "dropout is -1"),
        ("bottleneck", {}, {"blocks.0.attention.o_proj.up": None}, "o_proj.up is missing"),
        ("bottleneck", {}, {"blocks.0.attention.o_proj.more": torch.ones(1)}, "o_proj.more, which is no"),
        ("bottleneck", {}, {"blocks.7.attention.o_proj.up": torch.ones(1)}, "no linear layer"),
        ("prompt", {"num_virtual_tokens": 4}, {}, r"must be .* shape \(4, 24\)"),
        ("prompt", {"num_virtual_tokens": 1 << 40}, {}, "num_virtual_tokens must be a whole number"),
        ("prompt", {"num_transformer_submodules": 2}, {}, "must be 1"),
        ("prompt", {}, {"more": torch.ones(1)}, "prompt_embeddings and nothing else"),
        ("prompt", {"peft_type": "PREFIX_TUNING"}, {}, "prompt_tuning_init is not supported"),
        ("prefix", {}, {"prompt_embeddings": torch.ones(3, 31)}, r"must be .* shape \(3, 32\)"),
        ("prefix", {}, {"prompt_embeddings": torch.full((3, 32), float("nan"))}, "NaN"),
    ],
)
def test_other_methods(llama, tmp_path, method, fields, tensors, message):
    model = llama.ours()
    apply_adapter(model, OTHERS[method])
    save_adapter(model, tmp_path / "a", "base")
    change(tmp_path / "a", **fields)
    rewrite(tmp_path / "a", **tensors)
    refused(llama, tmp_path / "a", message)


def test_inputs_of_a_fused_module_cannot_be_scaled(tiny_model, tmp_path):
    phi3 = tiny_model("phi3")
    model = phi3.ours()
    apply_adapter(model, AdapterConfig("ia3"))
    save_adapter(model, tmp_path / "a", "base")
    rewrite(tmp_path / "a", **{f"{PROJECTION}.qkv_proj.ia3_l": torch.ones(1, 24)})
    refused(phi3, tmp_path / "a", "scales the inputs of a module that here is several")
