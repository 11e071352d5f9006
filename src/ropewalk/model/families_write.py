"""ModelConfig -> Hugging Face config dictionaries: what `families_config.py` reads, the other way."""

from copy import deepcopy
from typing import Any

from ropewalk.model.config import ModelConfig
from ropewalk.model.families import FAMILIES, Family
from ropewalk.model.families_config import ORIGINAL_LENGTH


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config of a model, as transformers 4 (rope_theta, rope_scaling) and 5 read it.

    Transformers 5 writes rope_parameters alone, and 4 then silently takes rope_theta = 10000: both are here.
    """
    family = FAMILIES[config.family]
    result: dict[str, Any] = {"model_type": config.family, "architectures": [family.architecture]}
    for name, (key, _) in family.keys.items():
        value = getattr(config, name)
        result[key] = list(value) if isinstance(value, tuple) else value
    if family.head_dim:
        result["head_dim"] = config.head_dim
    if config.query_pre_attn_scalar is not None:
        result["query_pre_attn_scalar"] = int(config.query_pre_attn_scalar)
    if config.family == "gpt2":  # transformers' default is 0.1; this model was run without
        result |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if config.family == "qwen3_moe":
        result |= {"num_local_experts": config.num_experts, "decoder_sparse_step": 1}
        dense = sorted(set(range(config.num_hidden_layers)) - set(config.moe_layers))
        result["mlp_only_layers"] = dense
    _write_windows(config, family, result)
    if config.position == "rope":
        _write_rope(config, result)
    return result


def _write_windows(config: ModelConfig, family: Family, result: dict[str, Any]) -> None:
    types = config.layer_types or ("full_attention",) * config.num_hidden_layers
    sliding = [i for i, t in enumerate(types) if t == "sliding_attention"]
    if family.windows == "layer_types":
        result["layer_types"] = list(types)
    if config.family.startswith("qwen"):
        result["use_sliding_window"] = bool(sliding)
    if config.family in ("qwen2", "qwen3"):
        result["max_window_layers"] = sliding[0] if sliding else config.num_hidden_layers


def _write_rope(config: ModelConfig, result: dict[str, Any]) -> None:
    scaling = deepcopy(config.rope_scaling)
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    partial = config.partial_rotary_factor
    if partial != 1.0 or config.family in ("phi3", "gpt_neox"):
        parameters["partial_rotary_factor"] = partial
        result["partial_rotary_factor"] = partial
    result |= {"rope_theta": config.rope_theta, "rope_parameters": parameters}
    result["rope_scaling"] = None if scaling is None else _older_scaling(config, scaling)
    if config.family == "phi3" or (scaling is not None and scaling["rope_type"] == "longrope"):
        result[ORIGINAL_LENGTH] = (scaling or {}).get(ORIGINAL_LENGTH, config.max_position_embeddings)
    if config.family == "gpt_neox":
        result |= {"rotary_emb_base": config.rope_theta, "rotary_pct": partial}
    if config.rope_local_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        result["rope_local_base_freq"] = config.rope_local_theta
        result["rope_parameters"] = {"full_attention": parameters, "sliding_attention": local}


def _older_scaling(config: ModelConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling as transformers 4 wants it: some classes refuse any key but those that they expect."""
    kind = scaling["rope_type"]
    if config.family == "olmo2" and kind in ("linear", "dynamic"):
        return {"type": kind, "factor": scaling["factor"]}
    if config.family == "phi3" and not scaling.keys() & {"factor", "attention_factor"}:
        return {"type": kind, "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
    return scaling
