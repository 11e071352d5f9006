"""A model as a Hugging Face directory that transformers opens without conversion."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_directory
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_weights import WeightRule, weight_map
from ropewalk.model.families_write import config_to_hf
from ropewalk.model.safetensors_file import NAMES, write_safetensors
from ropewalk.model.transformer import Transformer

SHARD_BYTES = 5_000_000_000
"""Weights above this are spread over several files."""


def save_model(
    model: Transformer,
    tokenizer: Any,
    path: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    values: Callable[[str], Tensor] | None = None,
) -> None:
    """Write config.json, generation_config.json, safetensors weights and the tokenizer's files, or nothing.

    Weights keep their dtype, bit for bit; a tied head is written once. `tokenizer` is one of transformers or
    None. `values` gives a whole parameter by its name; unless told, the model does. Raises UserError if
    `path` exists (unless `overwrite`), RopewalkError if the disk is full or the model holds something that is
    not part of its config (an adapter that is not merged).
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    rules = weight_map(model.config)
    _check_complete(model.config, rules, parameters)
    needed = sum(_size(rule, parameters) for rule in rules)
    with atomic_directory(path, overwrite, needed) as folder:
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        write_json(
            folder / "config.json", config_to_hf(model.config) | {"dtype": dtype, "torch_dtype": dtype}
        )
        generation = {"_from_model_config": True} | special_ids(model.config)
        write_json(folder / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_weights(rules, parameters, values or parameters.__getitem__, folder, shard_bytes)


def _check_complete(config: ModelConfig, rules: list[WeightRule], parameters: dict[str, Tensor]) -> None:
    wanted = {part for rule in rules for part in rule.parts}
    if odd := wanted.symmetric_difference(parameters):
        some = ", ".join(sorted(odd)[:3])
        raise RopewalkError(f"not a plain {config.family} model ({some}): merge its adapters before saving")


def _write_weights(
    rules: list[WeightRule],
    parameters: dict[str, Tensor],
    values: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int,
) -> None:
    """One file, or shards with an index; only one tensor is put together at a time."""
    shards: list[list[WeightRule]] = [[]]
    total = room = 0
    for rule in rules:
        size = _size(rule, parameters)
        if shards[-1] and room + size > shard_bytes:
            shards.append([])
            room = 0
        shards[-1].append(rule)
        total, room = total + size, room + size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {rule.hf: name for name, shard in zip(names, shards, strict=True) for rule in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
        )
    for name, shard in zip(names, shards, strict=True):
        entries = [(rule.hf, NAMES[parameters[rule.parts[0]].dtype], rule.shape) for rule in shard]
        write_safetensors(folder / name, entries, (_joined(rule, values) for rule in shard))


def _size(rule: WeightRule, parameters: dict[str, Tensor]) -> int:
    """Bytes of a stored tensor. The rule knows its shape; one of several processes has a part of it only."""
    return math.prod(rule.shape) * parameters[rule.parts[0]].element_size()


@torch.no_grad()
def _joined(rule: WeightRule, values: Callable[[str], Tensor]) -> Tensor:
    return rule.join([values(part).detach() for part in rule.parts])


def special_ids(config: ModelConfig) -> dict[str, Any]:
    """Of generation_config.json: transformers' generate reads them there and not in config.json."""
    eos = config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, and in the order of the alphabet."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
