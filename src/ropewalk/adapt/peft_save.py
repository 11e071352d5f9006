"""Adapters as a directory that `peft` reads (adapter_config.json, adapter_model.safetensors).

Where a family's Hugging Face files fuse several of our layers into one matrix, their adapters become one. Low
rank: the A's below each other and the B's as blocks of a larger B, ranks added up, the factor on B A kept.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.adapt.apply import adapter_parameters
from ropewalk.adapt.layers import BottleneckLinear, IA3Linear, adapted_layers
from ropewalk.adapt.lora import DoRALinear, LoRALinear, row_lengths
from ropewalk.adapt.peft_config import CONFIG
from ropewalk.adapt.targets import StoredModule, stored_modules
from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_directory
from ropewalk.model.transformer import Transformer
from ropewalk.ops.quantized import dequantized

WEIGHTS, PREFIX, PROMPT = "adapter_model.safetensors", "base_model.model.", "prompt_embeddings"
Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and fields of the config."""
Values = Callable[[str], Tensor]
"""A parameter by its name."""


def save_adapter(
    model: Transformer,
    path: str | Path,
    base_source: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    values: Values | None = None,
) -> None:
    """Writes the adapters of `model` as a PEFT directory, whole or not at all, in the adapters' dtype.

    `values` gives a whole parameter (those of `read_parameters`) by its name; unless told, the model does.
    `base_source` (and `revision`, of a hub id) say which model they belong to. PEFT has no bottleneck
    adapters: they get a peft_type of ours, BOTTLENECK. Raises UserError if `path` exists (unless
    `overwrite`), RopewalkError if the model carries no adapters.
    """
    from safetensors.torch import save_file

    values = values or model.get_parameter
    layers = dict(adapted_layers(model))
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    vectors = {name: layer for name, layer in layers.items() if isinstance(layer, IA3Linear)}
    if low_rank:
        tensors, fields = _low_rank(model, low_rank, values)
    elif vectors:
        tensors, fields = _vectors(model, vectors, values)
    elif layers:
        tensors, fields = _bottlenecks(model, values)
    elif model.virtual_tokens is not None:
        tensors, fields = _virtual_tokens(model, values)
    else:
        raise RopewalkError("there is no adapter to save: the model carries none")
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_source,
        "revision": revision,
        "inference_mode": True,
    } | fields
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_directory(path, overwrite, needed) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_parameters(model: Transformer) -> list[str]:
    """Names of the parameters that `save_adapter` reads: the adapters', and the weights whose row lengths are
    saved as DoRA's magnitudes because only a part of a fused module is adapted."""
    names = list(adapter_parameters(model))
    layers = dict(adapted_layers(model))
    if any(isinstance(layer, DoRALinear) for layer in layers.values()):
        stored = stored_modules(model.config)
        fused = dict.fromkeys(part for name in layers for part in stored[name].parts)
        names += [f"{part}.weight" for part in fused if part not in layers]
    return names


def _low_rank(model: Transformer, layers: dict[str, LoRALinear], values: Values) -> Saved:
    stored = stored_modules(model.config)
    one = next(iter(layers.values()))
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for module in dict.fromkeys(stored[name] for name in layers):
        parts = [layers.get(part) for part in module.parts]
        a, b = _joined(module, parts, values)
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = b
        if isinstance(one, DoRALinear):
            lengths = [_magnitude(model, part, values)[:, None] for part in module.parts]
            tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = module.rule.stack(lengths).flatten()
        scale, rank = next(part.scale for part in parts if part is not None), a.shape[0]
        shapes[module.name] = rank, _number(scale * (math.sqrt(rank) if one.rank_stabilized else rank))
    common = Counter((layer.rank, _number(layer.alpha)) for layer in layers.values()).most_common(1)[0][0]
    every = {module.name for module in stored.values()}
    ranks, alphas = _patterns(shapes, common, every)
    return tensors, {
        "peft_type": "LORA",
        "r": common[0],
        "lora_alpha": common[1],
        "lora_dropout": one.dropout,
        "target_modules": sorted(set(_endings(shapes, every).values())),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": one.rank_stabilized,
        "use_dora": isinstance(one, DoRALinear),
        "bias": "none",
        "fan_in_fan_out": _transposed(stored),
        "init_lora_weights": True,
    }


def _joined(module: StoredModule, parts: list[LoRALinear | None], values: Values) -> tuple[Tensor, Tensor]:
    """A and B of a Hugging Face module from its parts' adapters; a part without one gets zero rows in B."""
    named = zip(module.parts, parts, strict=True)
    present = {name: part.rank for name, part in named if part is not None}
    total = sum(present.values())
    a = torch.cat([values(f"{name}.lora_a").detach() for name in present])
    blocks, at = [], 0
    for name, rows in zip(module.parts, module.rule.rows, strict=True):
        block = a.new_zeros(rows, total)
        if name in present:
            block[:, at : at + present[name]] = values(f"{name}.lora_b").detach()
            at += present[name]
        blocks.append(block)
    return a, module.rule.stack(blocks)


def _magnitude(model: Transformer, name: str, values: Values) -> Tensor:
    """DoRA's magnitudes; of a layer without an adapter, the lengths of its rows, which change nothing."""
    if isinstance(model.get_submodule(name), DoRALinear):
        return values(f"{name}.magnitude").detach()
    weight = dequantized(values(f"{name}.weight"))
    return row_lengths(weight).to(weight.dtype)


def _vectors(model: Transformer, layers: dict[str, IA3Linear], values: Values) -> Saved:
    stored = stored_modules(model.config)
    tensors: dict[str, Tensor] = {}
    on_input: set[str] = set()
    for module in dict.fromkeys(stored[name] for name in layers):
        parts = [layers.get(part) for part in module.parts]
        if parts[0] is not None and parts[0].on_input:
            if len(parts) > 1:
                raise RopewalkError(
                    f"{module.parts[0]}: PEFT cannot scale the inputs of a part of {module.name}"
                )
            vector = values(f"{module.parts[0]}.vector")[None, :]
            on_input.add(module.name)
        else:
            named = zip(module.parts, parts, strict=True)
            known = {name: values(f"{name}.vector").detach() for name, part in named if part is not None}
            one = next(iter(known.values()))
            rows = zip(module.parts, module.rule.rows, strict=True)
            vector = module.rule.stack([known.get(name, one.new_ones(n))[:, None] for name, n in rows])
        tensors[f"{PREFIX}{module.name}.ia3_l"] = vector
    every = {module.name for module in stored.values()}
    names = {name.removeprefix(PREFIX).removesuffix(".ia3_l") for name in tensors}
    inputs = set(_endings(on_input, every).values())
    return tensors, {
        "peft_type": "IA3",
        "target_modules": sorted(inputs | set(_endings(names - on_input, every).values())),
        "feedforward_modules": sorted(inputs),
        "fan_in_fan_out": _transposed(stored),
        "init_ia3_weights": True,
    }


def _bottlenecks(model: Transformer, values: Values) -> Saved:
    name, one = next((n, layer) for n, layer in adapted_layers(model) if isinstance(layer, BottleneckLinear))
    tensors = {name: values(name) for name in adapter_parameters(model)}
    width = len(tensors[f"{name}.down"])
    return tensors, {"peft_type": "BOTTLENECK", "width": width, "dropout": one.dropout}


def _virtual_tokens(model: Transformer, values: Values) -> Saved:
    tokens, config = model.virtual_tokens, model.config
    assert tokens is not None
    fields: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING" if tokens.per_layer else "PROMPT_TUNING",
        "num_virtual_tokens": tokens.count,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
    }
    if tokens.per_layer:
        width = config.num_key_value_heads * config.head_dim
        fields |= {"token_dim": width, "num_attention_heads": config.num_key_value_heads}
        fields |= {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        fields |= {"token_dim": config.hidden_size, "num_attention_heads": config.num_attention_heads}
        fields |= {"prompt_tuning_init": "SAMPLE_VOCAB"}
    return {PROMPT: values("virtual_tokens.embedding.weight")}, fields


def _transposed(stored: dict[str, StoredModule]) -> bool:
    return any(module.rule.transposed for module in stored.values())


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
                ranks[ending], alphas[ending] = shape
    return ranks, alphas


def _endings(names: Iterable[str], every: set[str]) -> dict[str, str]:
    """For each name its shortest ending, in whole parts, that none of `every` but `names` shares."""
    taken = {ending for name in every.difference(names) for ending in _all_endings(name)}
    return {name: next(e for e in _all_endings(name) if e not in taken) for name in names}


def _all_endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _number(value: float) -> float:
    """Without noise in the last digits, and whole numbers without a decimal point: alpha is one in PEFT."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value
