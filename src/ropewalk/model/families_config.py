"""Hugging Face config dictionaries -> ModelConfig, refusing by name whatever cannot be said."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields as dataclass_fields
from typing import Any, get_args, get_origin

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.model.families import FAMILIES, HARMLESS, REQUIRED, Family
from ropewalk.model.layers import ACTIVATIONS

# rope_type -> the parameters it must and may have (names as in transformers' modeling_rope_utils).
ORIGINAL_LENGTH = "original_max_position_embeddings"
_ROPE: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), {"factor", ORIGINAL_LENGTH}),
    "linear": ({"factor"}, {ORIGINAL_LENGTH}),
    "dynamic": ({"factor"}, {ORIGINAL_LENGTH}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH}, set()),
    "yarn": (
        {"factor", ORIGINAL_LENGTH},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": ({"short_factor", "long_factor", ORIGINAL_LENGTH}, {"factor", "attention_factor"}),
}
# Sizes and the largest that is believed: a config is read before the file it comes with is.
_SIZES = {
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
}
_EXPERT_SIZES = {"num_experts": 2**16, "moe_intermediate_size": 2**24}
# Other numbers, and the range in which they mean something: beyond it there are NaN or errors in the middle.
_RANGES = {
    "norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "partial_rotary_factor": (1e-6, 1.0),
    "query_pre_attn_scalar": (1.0, 1e9),
    "attn_logit_softcapping": (1e-3, 1e9),
    "final_logit_softcapping": (1e-3, 1e9),
}
_TYPES = {field.name: field.type for field in dataclass_fields(ModelConfig)}


class _Reader:
    """A config dictionary that remembers which of its keys were understood."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where, self.seen = config, where, set[str]()

    def take(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.config.get(key, default)
        if value is REQUIRED:
            raise UserError(f"{self.where}: the config has no {key}; add it")
        return value

    def count(self, key: str, default: int, least: int = 1) -> int:
        value = self.take(key, default)
        if not _fits(value, int) or value < least:
            raise self.refuse(key, f"must be an integer from {least} on")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool | None):
            raise self.refuse(key, "must be true or false")
        return bool(value)

    def positive(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not _fits(value, float) or value <= 0:
            raise self.refuse(key, "must be a positive number")
        return float(value)

    def sequence(self, key: str) -> list[Any] | None:
        value = self.take(key)
        if not isinstance(value, list | tuple | None):
            raise self.refuse(key, "must be a list")
        return None if value is None else list(value)

    def refuse(self, key: str, reason: str) -> UserError:
        return UserError(f"{self.where}: {key} = {_short(self.config.get(key))}: {reason}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a ModelConfig field's type."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, int) and not isinstance(value, bool):
        return int in kinds or float in kinds
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    if isinstance(value, list | tuple):
        return any(get_origin(k) is tuple for k in kinds) and all(_fits(v, int) for v in value)
    return type(value) in kinds


def config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A Hugging Face config (the content of config.json, of transformers 4 or 5) as a ModelConfig.

    Missing keys take the defaults of transformers' config class; sizes have none. `where` starts the error
    message. Raises UserError, naming the field, for an architecture, field or value that is not supported.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        hint = "; of Gemma 3 only the text models (gemma3_text)" if model_type == "gemma3" else ""
        what = (
            "model_type is missing" if model_type is None else f"model_type {model_type!r} is not supported"
        )
        raise UserError(f"{where}: {what}{hint}; supported: {', '.join(FAMILIES)}")
    reader = _Reader(config, where)
    fields: dict[str, Any] = {"family": model_type, **family.fixed}
    for name, (key, default) in family.keys.items():
        fields[name] = value = reader.take(key, default)
        if not _fits(value, _TYPES[name]) and not (value is None and default is None):
            raise reader.refuse(key, "not a value that is understood")
    if model_type == "qwen3_moe" and "num_experts" not in config:  # transformers 5 writes this one
        fields["num_experts"] = reader.count("num_local_experts", fields["num_experts"])
    elif model_type == "qwen3_moe":
        reader.seen.add("num_local_experts")
    for key, allowed in family.expect.items():
        if (value := reader.take(key)) is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "no value"
            raise reader.refuse(key, f"not supported for {model_type}, only {wanted} is")
    if isinstance(fields["eos_token_id"], list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    _fill_sizes(reader, family, fields)
    _fill_experts(reader, fields)
    _fill_windows(reader, family, fields)
    if fields.get("position") != "learned":
        _fill_rope(reader, fields)
    for key, value in config.items():
        if key not in reader.seen and key not in HARMLESS and value is not None and value is not False:
            raise reader.refuse(key, f"not a config field that is understood for {model_type}")
    result = ModelConfig(**fields)
    _check(result, where)
    return result


def _fill_sizes(reader: _Reader, family: Family, fields: dict[str, Any]) -> None:
    """Derive what a config may leave out, and check that sizes are positive integers."""

    def check(*names: str) -> None:
        for name in names:
            value = fields[name]
            if not _fits(value, int) or not 0 < value <= _SIZES[name]:
                key = family.keys.get(name, (name,))[0]
                raise UserError(
                    f"{reader.where}: {key} = {_short(value)}: must be an integer from 1 to {_SIZES[name]:,}"
                )

    check("hidden_size", "num_attention_heads")
    heads = fields["num_attention_heads"]
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("intermediate_size") is None:
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    default = family.keys.get("head_dim", ("head_dim", None))[1]
    even, rest = divmod(fields["hidden_size"], heads)
    head_dim = reader.take("head_dim", default) or even
    if not family.head_dim and (head_dim != even or rest):
        raise reader.refuse("head_dim", f"{fields['family']} needs hidden_size / num_attention_heads")
    fields["head_dim"] = head_dim
    check(*_SIZES)
    if heads % fields["num_key_value_heads"]:
        raise reader.refuse("num_key_value_heads", f"does not divide the {heads} attention heads")


def _fill_experts(reader: _Reader, fields: dict[str, Any]) -> None:
    """Which layers are mixtures of experts: all in mixtral, by step and exception in qwen3_moe."""
    layers = range(fields["num_hidden_layers"])
    if fields["family"] == "mixtral":
        fields |= {"moe_layers": tuple(layers), "moe_intermediate_size": fields["intermediate_size"]}
    elif fields["family"] == "qwen3_moe":
        step, dense = reader.count("decoder_sparse_step", 1), reader.sequence("mlp_only_layers") or ()
        fields["moe_layers"] = tuple(i for i in layers if i not in dense and (i + 1) % step == 0)


def _fill_windows(reader: _Reader, family: Family, fields: dict[str, Any]) -> None:
    """layer_types, spelled out for every layer that slides; () where none does."""
    layers = fields["num_hidden_layers"]
    sliding: list[bool] = []
    if family.windows == "all":
        sliding = [fields["sliding_window"] is not None] * layers
    elif family.windows == "switched":
        reader.take("max_window_layers")  # written by Qwen, read by nobody
        sliding = [reader.flag("use_sliding_window")] * layers
    elif family.windows == "layer_types":
        sliding = _sliding_layers(reader, fields)
    if not any(sliding):
        if not fields["family"].startswith("gemma"):  # whose classes in transformers want a number anyway
            fields["sliding_window"] = None
        return
    window = fields["sliding_window"]
    if not isinstance(window, int) or window < 1:
        raise reader.refuse("sliding_window", "sliding layers need a positive number of tokens")
    fields["layer_types"] = tuple("sliding_attention" if s else "full_attention" for s in sliding)


def _sliding_layers(reader: _Reader, fields: dict[str, Any]) -> list[bool]:
    """Per layer, from layer_types or else the family's own pattern."""
    layers, family = fields["num_hidden_layers"], fields["family"]
    types = reader.sequence("layer_types")
    if family.startswith("qwen"):
        first = reader.count("max_window_layers", 28, least=0)
        pattern = [i >= first for i in range(layers)]
        if not reader.flag("use_sliding_window"):
            # transformers then drops the window whatever layer_types says.
            return [False] * layers
    else:
        reader.seen.add("_sliding_window_pattern")
        every = reader.count("sliding_window_pattern", 6) if family == "gemma3_text" else 2
        pattern = [bool((i + 1) % every) for i in range(layers)]
    if types is None:
        return pattern
    if len(types) != layers or not all(t in ("full_attention", "sliding_attention") for t in types):
        raise reader.refuse(
            "layer_types", f"must be full_attention or sliding_attention for each of the {layers} layers"
        )
    return [t == "sliding_attention" for t in types]


def _fill_rope(reader: _Reader, fields: dict[str, Any]) -> None:
    """RoPE from transformers 4's rope_theta + rope_scaling or transformers 5's rope_parameters."""
    family = fields["family"]
    key = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    reader.seen.update(("rope_scaling", "rope_parameters"))
    given = reader.config.get(key) or {}
    if not isinstance(given, Mapping):
        raise reader.refuse(key, "must be a mapping")
    theta = reader.positive("rope_theta", 1e6 if family in ("mixtral", "gemma3_text") else 1e4)
    partial = reader.positive("partial_rotary_factor", 1.0)
    if family == "gpt_neox":
        theta, partial = reader.positive("rotary_emb_base", theta), reader.positive("rotary_pct", 0.25)
    if family == "gemma3_text":
        local = reader.positive("rope_local_base_freq", 1e4)
        if "sliding_attention" in given or "full_attention" in given:
            sliding, given = given.get("sliding_attention") or {}, given.get("full_attention") or {}
            if not isinstance(sliding, Mapping) or not isinstance(given, Mapping):
                raise reader.refuse(key, "must be a mapping for each layer type")
            if sliding.get("rope_type", "default") != "default":
                raise reader.refuse(key, "scaling of the sliding layers' RoPE is not supported")
            local = sliding.get("rope_theta", local)
        fields["rope_local_theta"] = local
    scaling = {k: deepcopy(v) for k, v in given.items() if v is not None}
    fields["rope_theta"] = scaling.pop("rope_theta", theta)
    fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", partial)
    for name in ("rope_theta", "partial_rotary_factor", "rope_local_theta"):
        if name in fields and (not _fits(fields[name], float) or fields[name] <= 0):
            raise reader.refuse(key, f"{name} must be a positive number")
    old_name = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_name)
    if family == "phi3" and kind in ("su", "yarn"):  # longrope's first names
        kind = "longrope"
    if (original := reader.take(ORIGINAL_LENGTH, 4096 if family == "phi3" else None)) is not None:
        scaling[ORIGINAL_LENGTH] = original  # it goes before the one inside the mapping, as in transformers
    elif kind in ("llama3", "yarn", "longrope"):
        scaling.setdefault(ORIGINAL_LENGTH, fields["max_position_embeddings"])
    fields["rope_scaling"] = _check_rope(reader, family, key, kind, scaling)


def _check_rope(
    reader: _Reader, family: str, key: str, kind: str, scaling: dict[str, Any]
) -> dict[str, Any] | None:
    """The scaling with its type in it; None for plain RoPE."""
    supported = ["default", "longrope"] if family == "phi3" else list(_ROPE)
    if kind not in supported:
        raise reader.refuse(
            key, f"rope_type {kind!r} is not supported for {family}; supported: {', '.join(supported)}"
        )
    required, optional = _ROPE[kind]
    if missing := required - scaling.keys():
        raise reader.refuse(key, f"rope_type {kind!r} needs {', '.join(sorted(missing))}")
    if unknown := scaling.keys() - required - optional:
        raise reader.refuse(key, f"{', '.join(sorted(unknown))} is not understood for rope_type {kind!r}")
    for name, value in scaling.items():
        many = name in ("short_factor", "long_factor")
        if many != isinstance(value, list | tuple):
            raise reader.refuse(key, f"{name} must be {'a list of numbers' if many else 'a number'}")
        least = 0.0 if name.startswith("mscale") else 1e-9
        for number in value if many else [value]:
            if name != "truncate" and not (_fits(number, float) and number >= least):
                raise reader.refuse(key, f"{name} must be positive")
    if kind == "longrope" and scaling[ORIGINAL_LENGTH] <= 1:
        raise reader.refuse(key, f"{ORIGINAL_LENGTH} must be above 1")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise reader.refuse(key, "high_freq_factor must be above low_freq_factor")
    if kind in ("linear", "dynamic"):
        scaling.pop(ORIGINAL_LENGTH, None)
    return None if kind == "default" else {"rope_type": kind, **scaling}


def _check(config: ModelConfig, where: str) -> None:
    """What no single field shows."""
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {config.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    _check_numbers(config, where)
    if config.position == "learned":
        return
    rotary = int(config.head_dim * config.partial_rotary_factor)
    if config.partial_rotary_factor != 1.0 and config.family not in ("phi3", "gpt_neox"):
        raise UserError(f"{where}: partial_rotary_factor is not supported for {config.family}")
    half = (rotary + 1) // 2
    if not 0 < 2 * half <= config.head_dim:
        raise UserError(f"{where}: RoPE over {rotary} of head_dim {config.head_dim} elements is not possible")
    for name in ("short_factor", "long_factor"):
        if (factors := (config.rope_scaling or {}).get(name)) is not None and len(factors) != half:
            raise UserError(f"{where}: rope_scaling.{name} has {len(factors)} numbers, RoPE needs {half}")
    kind = (config.rope_scaling or {}).get("rope_type")
    if kind == "dynamic" and rotary <= 2:
        raise UserError(f"{where}: rope_type 'dynamic' needs RoPE over more than {rotary} elements of a head")
    if kind == "yarn" and (config.rope_theta <= 1 or rotary % 2):
        raise UserError(
            f"{where}: rope_type 'yarn' needs a rope_theta above 1 and an even number of elements"
        )


def _check_numbers(config: ModelConfig, where: str) -> None:
    """Every number on its own, and the experts of a token."""
    keys = FAMILIES[config.family].keys
    limits: dict[str, tuple[float, float]] = dict(_RANGES)
    if config.moe_layers:
        limits |= {name: (1, most) for name, most in _EXPERT_SIZES.items()}
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            key = keys.get(name, (name,))[0]
            raise UserError(f"{where}: {key} = {_short(value)}: must be from {least:,} to {most:,}")
    if config.query_pre_attn_scalar is not None and config.query_pre_attn_scalar % 1:
        raise UserError(
            f"{where}: query_pre_attn_scalar = {config.query_pre_attn_scalar}: must be a whole number"
        )
    if config.moe_layers and not 0 < config.num_experts_per_tok <= config.num_experts:
        raise UserError(
            f"{where}: num_experts_per_tok = {config.num_experts_per_tok} of {config.num_experts} experts"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
