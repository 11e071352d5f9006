"""adapter_config.json: read, and refused by name where it says what is not understood."""

import re
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.files import read_json_object

CONFIG = "adapter_config.json"
MAX_RANK = 1 << 16
MAX_ALPHA = 1e30
"""What float32 still holds after the sums."""
_BOOKKEEPING = frozenset(
    "peft_type base_model_name_or_path revision task_type auto_mapping inference_mode peft_version "
    "runtime_config".split()
)
_VIRTUAL_TOKENS = frozenset(
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers".split()
)
_KNOWN = {
    "LORA": frozenset(
        """
        r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora use_dora bias megatron_core
        qalora_group_size ensure_weight_tying fan_in_fan_out target_modules exclude_modules
        layers_to_transform layers_pattern init_lora_weights eva_config
        """.split()
    ),
    "IA3": frozenset(
        "target_modules exclude_modules feedforward_modules fan_in_fan_out init_ia3_weights".split()
    ),
    "PROMPT_TUNING": _VIRTUAL_TOKENS
    | frozenset("prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()),
    "PREFIX_TUNING": _VIRTUAL_TOKENS
    | frozenset("encoder_hidden_size prefix_projection init_weights".split()),
    "BOTTLENECK": frozenset(("width", "dropout")),
}
"""What may be set: it is used, or chose modules and first values, which the tensors in the file show too."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The config, after refusing every feature that is switched on and not understood.

    Raises UserError, naming file and field.
    """
    config = read_json_object(path)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise UserError(f"{path}: peft_type is {kind!r}; those that can be loaded are {', '.join(_KNOWN)}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{path}: task_type is {config['task_type']!r}; only CAUSAL_LM can be loaded")
    for key, value in config.items():
        if value and key not in _KNOWN[kind] | _BOOKKEEPING:
            raise UserError(f"{path}: {key} is not supported (its value is {str(value)[:100]})")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{path}: num_transformer_submodules must be 1: the model is a decoder and no more")
    if kind == "LORA":
        _check_low_rank(config, path)
    _check_dropout(config, path)
    return config


def _check_low_rank(config: dict[str, Any], path: Path) -> None:
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {config['bias']!r}; adapters that train biases cannot be loaded")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {initial!r}, which changed the base model; "
            "save the adapter again with peft's path_initial_model_for_weight_conversion"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{path}: {key} is no JSON object")
        for name in pattern:
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise UserError(f"{path}: {key} has {name!r}; only plain module names are supported there")
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and 0 < rank <= MAX_RANK for rank in ranks):
        raise UserError(f"{path}: r and rank_pattern must be whole numbers from 1 to {MAX_RANK:,}")
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    if not all(type(alpha) in (int, float) and abs(alpha) <= MAX_ALPHA for alpha in alphas):  # no NaN either
        raise UserError(f"{path}: lora_alpha and alpha_pattern must be finite numbers, to {MAX_ALPHA:g}")


def _check_dropout(config: dict[str, Any], path: Path) -> None:
    for key in ("lora_dropout", "dropout"):
        dropout = config.get(key) or 0.0
        if not (type(dropout) in (int, float) and 0 <= dropout < 1):
            raise UserError(f"{path}: {key} is {dropout!r}; it must be at least 0 and less than 1")


def of_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that ends the module's name in whole parts (^: is all of it), as in PEFT."""
    for key, value in (pattern or {}).items():
        if f"^{module}" == key or module == key or module.endswith("." + key):
            return value
    return default
