"""Adapters as a directory that `peft` reads (adapter_config.json, adapter_model.safetensors).

Where a family's Hugging Face files fuse several of our layers into one matrix, their adapters become one:
the A's below each other and the B's as blocks of a larger B, with their ranks and alphas added up. B A is the
same, and so is alpha / rank.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.adapt.lora import LoRALinear, lora_layers
from ropewalk.adapt.targets import StoredModule, stored_modules
from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_directory
from ropewalk.model.transformer import Transformer

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def save_adapter(
    model: Transformer,
    path: str | Path,
    base_source: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of `model` as a PEFT directory, whole or not at all, in the adapters' dtype.

    `base_source` (and `revision`, of a hub id) say which model they belong to. Raises UserError if `path`
    exists (unless `overwrite`), RopewalkError if the model carries no adapters.
    """
    from safetensors.torch import save_file

    layers = dict(lora_layers(model))
    if not layers:
        raise RopewalkError("there is no adapter to save: the model carries none")
    stored = stored_modules(model.config)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for module in dict.fromkeys(stored[name] for name in layers):
        parts = [layers.get(part) for part in module.parts]
        a, b = _joined(module, parts)
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = b
        shapes[module.name] = a.shape[0], sum(part.alpha for part in parts if part is not None)
    common = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(1)[0][0]
    every = {module.name for module in stored.values()}
    ranks, alphas = _patterns(shapes, common, every)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_source,
        "revision": revision,
        "r": common[0],
        "lora_alpha": _number(common[1]),
        "lora_dropout": next(iter(layers.values())).dropout,
        "target_modules": sorted(set(_endings(shapes, every).values())),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": any(module.rule.transposed for module in stored.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_directory(path, overwrite, needed) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _joined(module: StoredModule, parts: list[LoRALinear | None]) -> tuple[Tensor, Tensor]:
    """A and B of a Hugging Face module from its parts' adapters; a part without one gets zero rows in B."""
    present = [part for part in parts if part is not None]
    total = sum(part.rank for part in present)
    blocks, at = [], 0
    for part, rows in zip(parts, module.rule.rows, strict=True):
        block = present[0].lora_b.detach().new_zeros(rows, total)
        if part is not None:
            block[:, at : at + part.rank] = part.lora_b.detach()
            at += part.rank
        blocks.append(block)
    return torch.cat([part.lora_a.detach() for part in present]), module.rule.stack(blocks).contiguous()


def _patterns(
    shapes: dict[str, tuple[int, float]], common: tuple[int, float], every: set[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern: name endings of the modules that differ from the common case."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for shape in dict.fromkeys(shapes.values()):
        if shape != common:
            same = [name for name, other in shapes.items() if other == shape]
            for ending in _endings(same, every).values():
                ranks[ending], alphas[ending] = shape[0], _number(shape[1])
    return ranks, alphas


def _endings(names: Iterable[str], every: set[str]) -> dict[str, str]:
    """For each name its shortest ending, in whole parts, that none of `every` but `names` shares."""
    taken = {ending for name in every.difference(names) for ending in _all_endings(name)}
    return {name: next(e for e in _all_endings(name) if e not in taken) for name in names}


def _all_endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _number(value: float) -> float:
    """Whole numbers without a decimal point: PEFT calls alpha an integer."""
    return int(value) if float(value).is_integer() else value
