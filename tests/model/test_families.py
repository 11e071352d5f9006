"""Configs and weight names go both ways without loss, and what is not understood is refused by name."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.model import Transformer, config_from_hf, config_to_hf, weight_map
from ropewalk.model.families import FAMILIES
from ropewalk.model.families_weights import stored_name

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
}
LLAMA = SIZES | {"model_type": "llama"}
NEOX = SIZES | {"model_type": "gpt_neox"}
GEMMA2 = SIZES | {"model_type": "gemma2", "num_key_value_heads": 3}
QWEN3_MOE = SIZES | {"model_type": "qwen3_moe", "num_key_value_heads": 3}
GPT2_SIZES = {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 6}


def sizes_for(family: str) -> dict:
    if family == "gpt2":
        return GPT2_SIZES
    kv_heads = {} if family in ("llama", "phi3", "olmo2", "gpt_neox") else {"num_key_value_heads": 3}
    return SIZES | kv_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_transformers_defaults(family):
    from transformers import AutoConfig

    full = AutoConfig.for_model(family, **sizes_for(family)).to_dict()
    assert config_from_hf({"model_type": family} | sizes_for(family)) == config_from_hf(full)


def test_configs_survive_transformers_and_its_older_form(pair):
    """Ours -> transformers 5 -> ours, and read by the keys of transformers 4 alone."""
    from transformers import AutoConfig

    config = pair.ours.config
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    assert config_from_hf(AutoConfig.for_model(**written).to_dict()) == config
    assert config_from_hf(pair.theirs.config.to_dict()) == config
    written.pop("rope_parameters", None)
    assert config_from_hf(written) == config


def test_rope_scaling_is_written_as_the_classes_of_transformers_4_insist(make_pair):
    """Tried with 4.57.6 on all cases; these are the keys that its strictest classes accept."""
    written = {n: config_to_hf(make_pair(n).ours.config) for n in ("olmo2-even", "phi3-longrope-long")}
    assert written["olmo2-even"]["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert set(written["phi3-longrope-long"]["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    longrope = config_to_hf(make_pair("llama-longrope").ours.config)
    assert longrope["original_max_position_embeddings"] == 32
    linear = config_to_hf(make_pair("gemma3-linear").ours.config)
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert linear["rope_theta"] == 70000.0
    assert linear["rope_local_base_freq"] == 300.0


# What the hubs' config.json files of these models say, but for sizes; written by transformers 4.
HUB = {
    "SmolLM2-135M": LLAMA
    | {"rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "is_llama_config": True}
    | {"attention_bias": False, "pretraining_tp": 1, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "num_key_value_heads": 3},
    "Llama-3.2-1B": LLAMA
    | {"rope_theta": 500000.0, "head_dim": 64, "mlp_bias": False, "eos_token_id": [5, 6, 7]}
    | {
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 131072,
    },
    "Mistral-7B-v0.1": sizes_for("mistral") | {"model_type": "mistral", "sliding_window": 4096},
    "Qwen2.5-yarn": sizes_for("qwen2")
    | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    | {"rope_theta": 1000000.0, "max_position_embeddings": 131072},
    "gemma-2-2b": sizes_for("gemma2")
    | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    | {
        "cache_implementation": "hybrid",
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e4,
    },
    "gemma-3-1b": sizes_for("gemma3_text")
    | {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
    }
    | {"sliding_window": 512, "sliding_window_pattern": 6, "eos_token_id": [1, 106], "head_dim": 256},
    "gemma-3-4b": sizes_for("gemma3_text")
    | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "Phi-3-mini-128k": sizes_for("phi3")
    | {"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}}
    | {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False},
    "Phi-4-mini": sizes_for("phi3")
    | {"model_type": "phi3", "partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1}
    | {"lm_head_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "sliding_window": 262144},
    "pythia-70m": SIZES
    | {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20000, "use_parallel_residual": True},
    "gpt2": GPT2_SIZES
    | {"model_type": "gpt2", "n_ctx": 1024, "task_specific_params": {"text-generation": {"max_length": 50}}}
    | {"attn_pdrop": 0.1, "summary_type": "cls_index", "activation_function": "gelu_new"},
    "Mixtral-8x7B": sizes_for("mixtral")
    | {"model_type": "mixtral", "sliding_window": None, "rope_theta": 1e6},
    "Qwen3-30B-A3B": sizes_for("qwen3_moe")
    | {
        "model_type": "qwen3_moe",
        "max_window_layers": 48,
        "use_sliding_window": False,
        "sliding_window": None,
    }
    | {
        "num_experts": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "head_dim": 128,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_configs_of_well_known_models_mean_what_transformers_reads_in_them(name):
    from transformers import AutoConfig

    fields = json.loads(json.dumps(HUB[name]))
    expected = config_from_hf(AutoConfig.for_model(**fields).to_dict())
    assert config_from_hf(HUB[name]) == expected


REFUSED = {
    "architecture": ({"model_type": "mamba"}, "mamba"),
    "no architecture": ({"model_type": None}, "model_type is missing"),
    "vision": ({"model_type": "gemma3"}, "gemma3_text"),
    "unknown field": ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "no size": ({"hidden_size": None}, "hidden_size"),
    "size of text": ({"vocab_size": "37"}, "vocab_size = '37'"),
    "negative size": ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    "huge size": ({"vocab_size": 2**40}, "vocab_size"),
    "groups": ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
    "activation": ({"hidden_act": "xielu"}, "xielu"),
    "window": ({"sliding_window": 128}, "sliding_window = 128"),
    "rope type": ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
    "rope field": ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "alpha"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "factor"),
    "rope not a number": ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor"),
    "theta": ({"rope_theta": "many"}, "rope_theta = 'many'"),
    "theta inside": ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
    "switch as text": ({"attention_bias": "false"}, "attention_bias = 'false'"),
    "eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "negative eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05"),
    "negative deviation": ({"initializer_range": -0.02}, "initializer_range = -0.02"),
    "more than all of a head": ({**NEOX, "rotary_pct": 1e308}, "partial_rotary_factor"),
    "yarn without growth": (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_theta above 1",
    ),
    "dynamic of one pair": (
        {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "more than 2 elements",
    ),
    "longrope without an original": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.0, 1.0],
                "long_factor": [2.0, 2.0, 2.0],
                "original_max_position_embeddings": 1,
            }
        },
        "above 1",
    ),
    "no scale of queries": ({**GEMMA2, "query_pre_attn_scalar": -256}, "query_pre_attn_scalar = -256"),
    "fraction that is not saved": ({**GEMMA2, "query_pre_attn_scalar": 100.5}, "whole number"),
    "cap of nothing": ({**GEMMA2, "attn_logit_softcapping": 0.0}, "attn_logit_softcapping = 0.0"),
    "cap of no logits": ({**GEMMA2, "final_logit_softcapping": 0}, "final_logit_softcapping = 0"),
    "empty experts": ({**QWEN3_MOE, "moe_intermediate_size": 0}, "moe_intermediate_size = 0"),
    "special id": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "llama3 bounds": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "high_freq_factor",
    ),
    "rope as text": ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved = True"),
    "odd head": ({"head_dim": 7}, "head_dim"),
    "phi3 yarn": ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "phi3 factors": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
        "short_factor",
    ),
    "gpt2 layer scale": (
        {"model_type": "gpt2", **GPT2_SIZES, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
    ),
    "gpt2 heads": ({"model_type": "gpt2", **GPT2_SIZES, "n_head": 5}, "gpt2 needs hidden_size"),
    "neox heads": ({"model_type": "gpt_neox", "head_dim": 8}, "head_dim = 8"),
    "gemma3 soft-cap": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping",
    ),
    "bidirectional": (
        {"model_type": "gemma2", "num_key_value_heads": 3, "use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "layer types": (
        {"model_type": "gemma2", "num_key_value_heads": 3, "layer_types": ["chunked_attention"] * 8},
        "layer_types",
    ),
    "layer count": (
        {"model_type": "gemma2", "num_key_value_heads": 3, "layer_types": ["full_attention"]},
        "layer_types",
    ),
    "jitter": (
        {"model_type": "mixtral", "num_key_value_heads": 3, "router_jitter_noise": 0.1},
        "router_jitter",
    ),
    "experts": (
        {"model_type": "mixtral", "num_key_value_heads": 3, "num_experts_per_tok": 9},
        "num_experts_per_tok = 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    changes, wanted = REFUSED[name]
    base = {} if changes.get("model_type") == "gpt2" else LLAMA
    if changes.get("model_type") == "gemma3_text":
        base = base | {"num_key_value_heads": 3}
    fields = {k: v for k, v in (base | changes).items() if v is not None or k == "model_type"}
    with pytest.raises(UserError) as error:
        config_from_hf(fields, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert wanted in str(error.value)


def test_the_first_names_of_longrope_mean_longrope():
    for name in ("su", "yarn"):  # transformers 5 no longer reads these itself
        fields = HUB["Phi-3-mini-128k"]
        renamed = fields | {"rope_scaling": fields["rope_scaling"] | {"type": name}}
        assert config_from_hf(renamed) == config_from_hf(fields)


def test_unset_and_harmless_keys_are_no_obstacle():
    extra = {"some_new_thing": None, "other_switch": False, "use_cache": True, "attention_dropout": 0.1}
    assert config_from_hf(LLAMA | extra) == config_from_hf(LLAMA)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "a"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damaged_config_is_refused_or_makes_a_model(make_pair, case_names, data):
    """No traceback, and nothing accepted that the model's modules cannot be made of."""
    fields = config_to_hf(make_pair(data.draw(st.sampled_from(case_names))).ours.config)
    where = fields
    key = data.draw(st.sampled_from(sorted(fields)))
    if isinstance(fields[key], dict) and data.draw(st.booleans()):
        where = fields[key]
        key = data.draw(st.sampled_from(sorted(where)))
    where[key] = data.draw(JSON)
    try:
        config = config_from_hf(fields)
    except UserError:
        return
    if config.num_hidden_layers * max(1, config.num_experts) < 100:
        with torch.device("meta"):
            model = Transformer(config)
        assert len(list(model.parameters())) == sum(len(rule.parts) for rule in weight_map(config))


def test_every_parameter_is_in_one_rule_with_its_shape(pair):
    parts = {}
    for rule in weight_map(pair.ours.config):
        for part, rows in zip(rule.parts, rule.rows, strict=True):
            assert part not in parts
            parts[part] = (rows,) if rule.columns is None else (rows, rule.columns)
    assert parts == {name: tuple(p.shape) for name, p in pair.ours.named_parameters()}


def test_rules_invert_exactly(pair):
    generator = torch.manual_seed(0)
    for rule in weight_map(pair.ours.config):
        stored = torch.randn(rule.shape, generator=generator)
        parts = rule.split(stored)
        assert [len(p) for p in parts] == list(rule.rows)
        assert torch.equal(rule.join(parts), stored)
        again = rule.split(rule.join(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_rules_hold_for_the_rows_of_an_adapter(pair):
    """A LoRA delta per module, stacked as the rows are, is the delta of the stored matrix."""
    generator = torch.manual_seed(0)
    for rule in weight_map(pair.ours.config):
        if len(rule.parts) < 2 or rule.columns is None:
            continue
        a = [torch.randn(2, rule.columns, generator=generator) for _ in rule.parts]
        b = [torch.randn(rows, 2, generator=generator) for rows in rule.rows]
        expected = rule.stack([y @ x for x, y in zip(a, b, strict=True)])
        wide = [
            torch.cat([y if i == j else torch.zeros(rows, 2) for j in range(len(b))], 1)
            for i, (y, rows) in enumerate(zip(b, rule.rows, strict=True))
        ]
        torch.testing.assert_close(rule.stack(wide) @ torch.cat(a), expected)


@pytest.mark.parametrize(
    ("family", "found", "wanted"),
    [
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "norm.weight", "model.norm.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("gpt2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        ("gpt2", "h.1.attn.bias", None),
        ("gpt2", "lm_head.weight", None),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", None),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.bias"),
    ],
)
def test_stored_names(family, found, wanted):
    config = config_from_hf({"model_type": family} | sizes_for(family))
    assert stored_name(config, found) == wanted


def test_a_model_on_the_meta_device_takes_no_memory_and_stays_tied():
    config = config_from_hf(
        LLAMA | {"hidden_size": 6 * 2**12, "vocab_size": 10**6, "tie_word_embeddings": True}
    )
    with torch.device("meta"):
        model = Transformer(config)
    assert model.head.weight is model.embed.weight
    small = config_from_hf(LLAMA | {"tie_word_embeddings": True})
    with torch.device("meta"):
        model = Transformer(small)
    model = model.to_empty(device="cpu").bfloat16()
    assert model.head.weight is model.embed.weight
    assert model.output_weight.dtype == torch.bfloat16
