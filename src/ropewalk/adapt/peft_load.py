"""A LoRA adapter from a directory in PEFT's format.

It is untrusted: safetensors only, and what is not understood is refused by name.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.adapt.lora import adapt, check_plain, lora_layers
from ropewalk.adapt.peft_save import CONFIG, PREFIX, WEIGHTS
from ropewalk.adapt.targets import StoredModule, linear_layers, stored_modules
from ropewalk.errors import UserError
from ropewalk.model.safetensors_file import FLOATS, StoredTensor, read_chunks, read_header
from ropewalk.model.transformer import Transformer

_USED = frozenset("peft_type r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora bias".split())
_NO_MATTER = frozenset(
    """
    base_model_name_or_path revision task_type auto_mapping inference_mode peft_version megatron_core
    qalora_group_size runtime_config ensure_weight_tying fan_in_fan_out
    target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights eva_config
    """.split()
)
"""Bookkeeping, and what chooses the modules or their first values: the tensors in the file say both."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_RANK = 1 << 16


def load_adapter(model: Transformer, path: str | Path) -> list[str]:
    """Freezes `model` and puts the adapters of a PEFT directory beside its layers, in place; returns names.

    The adapters get their layers' dtype and can be trained on. A matrix that Hugging Face fuses and we do not
    is cut up exactly: each part gets the A and its rows of B. Raises UserError, naming file and field or
    tensor, for everything that PEFT can do and this cannot, and for files that do not fit the model.
    """
    check_plain(model)
    path = Path(path)
    config = _read_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        pickled = "; a pickled one (.bin) can run code and is not read" if any(path.glob("*.bin")) else ""
        raise UserError(f"{path}: it has no {WEIGHTS}{pickled}")
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for name, (module, stored_a, stored_b) in _match(model, path / WEIGHTS).items():
        rank = stored_a.shape[0]
        alpha = _alpha(config, name, rank, path)
        for part, (a, b) in _cut(module, _read(stored_a), _read(stored_b)).items():
            matrices[part] = a, b
            shapes[part] = len(a), alpha * len(a) / rank
    order = [name for name in linear_layers(model) if name in matrices]
    adapt(model, {name: shapes[name] for name in order}, float(config.get("lora_dropout") or 0.0))
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_a.copy_(matrices[name][0])
            layer.lora_b.copy_(matrices[name][1])
    return order


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, after refusing every feature that is switched on and not understood."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be loaded")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{path}: task_type is {config['task_type']!r}; only CAUSAL_LM can be loaded")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {config['bias']!r}; adapters that train biases cannot be loaded")
    for key, value in config.items():
        if value and key not in _USED | _NO_MATTER:
            raise UserError(f"{path}: {key} is not supported (its value is {str(value)[:100]})")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {initial!r}, which changed the base model; "
            "save the adapter again with peft's path_initial_model_for_weight_conversion"
        )
    _check_numbers(config, path)
    return config


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{path}: {key} is no JSON object")
        for name in pattern:
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise UserError(f"{path}: {key} has {name!r}; only plain module names are supported there")
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and 0 < rank <= _MAX_RANK for rank in ranks):
        raise UserError(f"{path}: r and rank_pattern must be whole numbers from 1 to {_MAX_RANK:,}")
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise UserError(f"{path}: lora_alpha and alpha_pattern must be finite numbers")
    dropout = config.get("lora_dropout") or 0.0
    if not (type(dropout) in (int, float) and 0 <= dropout < 1):
        raise UserError(f"{path}: lora_dropout is {dropout!r}; it must be at least 0 and less than 1")


Pair = tuple[StoredModule, StoredTensor, StoredTensor]


def _match(model: Transformer, file: Path) -> dict[str, Pair]:
    """Hugging Face module name -> (module, A, B), after checking that the file fits the model."""
    known = {stored.name: stored for stored in stored_modules(model.config).values()}
    layers = set(linear_layers(model))
    tensors = read_header(file)
    found: dict[str, Pair] = {}
    for name in tensors:
        inner = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        module = known.get(inner[1]) if inner else None
        if inner is None or module is None or not layers.issuperset(module.parts):
            raise UserError(
                f"{file}: the tensor {name[:200]!r} is no adapter of a linear layer in the blocks of this "
                f"{model.config.family} model (those are all that can be loaded)"
            )
        pair = [tensors.get(f"{PREFIX}{module.name}.lora_{kind}.weight") for kind in "AB"]
        if pair[0] is None or pair[1] is None:
            raise UserError(f"{file}: {name} is there, but not its other half")
        _check_pair(module, pair[0], pair[1])
        found[module.name] = module, pair[0], pair[1]
    if not found:
        raise UserError(f"{file}: it holds no adapters")
    return found


def _check_pair(module: StoredModule, a: StoredTensor, b: StoredTensor) -> None:
    for tensor in (a, b):
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            found = f"{tensor.dtype} {tensor.shape}"
            raise UserError(f"{tensor.file}: {tensor.name} is {found}, no matrix of floating-point numbers")
    rank, columns = a.shape
    rows = sum(module.rule.rows)
    if (columns, b.shape) != (module.rule.columns, (rows, rank)) or not 0 < rank <= _MAX_RANK:
        raise UserError(
            f"{a.file}: the adapter of {module.name} has shapes {a.shape} and {b.shape}; "
            f"in this model they must be (r, {module.rule.columns}) and ({rows}, r)"
        )


def _alpha(config: dict[str, Any], module: str, rank: int, path: Path) -> float:
    """What, divided by the rank, is the factor on B A; after checking the rank that the config claims."""
    claimed = _of_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if claimed != rank:
        raise UserError(f"{path / WEIGHTS}: the adapter of {module} has rank {rank}; {CONFIG} says {claimed}")
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _of_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that ends the module's name in whole parts (^: is all of it), as in PEFT."""
    for key, value in (pattern or {}).items():
        if f"^{module}" == key or module == key or module.endswith("." + key):
            return value
    return default


def _read(tensor: StoredTensor) -> Tensor:
    """A stored matrix, refused if it holds a NaN or an infinity."""
    values = torch.cat([chunk.clone() for chunk in read_chunks(tensor)]).view(tensor.shape)
    if not values.isfinite().all():
        raise UserError(f"{tensor.file}: {tensor.name} holds NaN or infinite values")
    return values


def _cut(module: StoredModule, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each part. Ranks of a fused B that are zero in a part's rows are not that part's."""
    parts = dict(zip(module.parts, module.rule.unstack(b), strict=True))
    if len(parts) == 1 or not b.any():
        return {part: (a, rows) for part, rows in parts.items()}
    return {part: (a[rows.any(0)], rows[:, rows.any(0)]) for part, rows in parts.items() if rows.any()}
