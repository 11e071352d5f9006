"""Adapters from a directory in PEFT's format.

It is untrusted: safetensors only, and what is not understood is refused by name.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.adapt.apply import add_virtual_tokens, check_plain, linear, put_on
from ropewalk.adapt.layers import AdaptedLinear, BottleneckLinear, IA3Linear
from ropewalk.adapt.lora import DoRALinear, LoRALinear, row_lengths
from ropewalk.adapt.peft_config import CONFIG, MAX_RANK, of_pattern, read_adapter_config
from ropewalk.adapt.peft_save import PREFIX, PROMPT, WEIGHTS
from ropewalk.adapt.targets import StoredModule, linear_layers, stored_modules
from ropewalk.errors import UserError
from ropewalk.model.safetensors_file import FLOATS, StoredTensor, read_chunks, read_header
from ropewalk.model.transformer import Transformer
from ropewalk.model.virtual import VirtualTokens
from ropewalk.ops.quantized import dequantized


def load_adapter(model: Transformer, path: str | Path) -> list[str]:
    """Freezes `model` and puts on it the adapters of a PEFT directory, in place; the names of the modules.

    The adapters get their layers' dtype and can be trained on. What belongs to a matrix that Hugging Face
    fuses and we do not is cut up exactly. Raises UserError, naming file and field or tensor, for everything
    that PEFT can do and this cannot, and for files that do not fit the model.
    """
    check_plain(model)
    path = Path(path)
    config = read_adapter_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        pickled = "; a pickled one (.bin) can run code and is not read" if any(path.glob("*.bin")) else ""
        raise UserError(f"{path}: it has no {WEIGHTS}{pickled}")
    if config["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return _load_virtual_tokens(model, config, path / WEIGHTS)
    readers: dict[str, Callable[[Transformer, dict[str, Any], Path], Layers]] = {
        "LORA": _low_rank,
        "IA3": _vectors,
        "BOTTLENECK": _bottlenecks,
    }
    layers = readers[config["peft_type"]](model, config, path / WEIGHTS)
    order = [name for name in linear_layers(model) if name in layers]
    put_on(model, {name: layers[name][0] for name in order})
    with torch.no_grad():
        for name in order:
            layer, values = layers[name]
            for kind, value in values.items():
                layer.get_parameter(kind).copy_(value)
    return order


Layers = dict[str, tuple[AdaptedLinear, dict[str, Tensor]]]
"""By the name of its place: a new layer, and the values of its parameters."""


def _low_rank(model: Transformer, config: dict[str, Any], file: Path) -> Layers:
    """LORA: of each module A `[r, in]` and B `[out, r]`, and with use_dora the magnitudes `[out]`."""
    kinds = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * bool(config.get("use_dora"))
    dropout = float(config.get("lora_dropout") or 0.0)
    stabilized = bool(config.get("use_rslora"))
    layers: Layers = {}
    for module, stored in _match(model, file, kinds):
        stored_a, stored_b = stored[kinds[0]], stored[kinds[1]]
        _check_pair(module, stored_a, stored_b)
        rank = stored_a.shape[0]
        scale = _alpha(config, module.name, rank, file) / (math.sqrt(rank) if stabilized else rank)
        magnitudes = None
        if config.get("use_dora"):
            _check_shape(stored[kinds[2]], (sum(module.rule.rows),))
            magnitudes = module.rule.unstack(_read(stored[kinds[2]])[:, None])
        for part, values in _cut(model, module, _read(stored_a), _read(stored_b), magnitudes).items():
            kind, own = LoRALinear if magnitudes is None else DoRALinear, len(values["lora_a"])
            alpha = scale * (math.sqrt(own) if stabilized else own)
            base = linear(model, part)
            layer = kind(base, own, float(f"{alpha:.12g}"), dropout, torch.Generator(), stabilized)
            layers[part] = layer, values
    return layers


def _vectors(model: Transformer, config: dict[str, Any], file: Path) -> Layers:
    """IA3: of each module the factors of its outputs `[out, 1]`, or of its inputs `[1, in]`."""
    layers: Layers = {}
    for module, stored in _match(model, file, ["ia3_l"]):
        tensor, rows, columns = stored["ia3_l"], sum(module.rule.rows), module.rule.columns
        assert columns is not None  # vectors have no adapters
        on_input = tensor.shape == (1, columns)
        if on_input and len(module.parts) > 1:
            raise UserError(f"{file}: {tensor.name} scales the inputs of a module that here is several")
        _check_shape(tensor, (1, columns) if on_input else (rows, 1))
        values = _read(tensor)
        parts = dict(zip(module.parts, [values] if on_input else module.rule.unstack(values), strict=True))
        trained = {part: part_values for part, part_values in parts.items() if (part_values != 1).any()}
        for part, part_values in (trained or parts).items():
            layers[part] = IA3Linear(linear(model, part), on_input), {"vector": part_values.flatten()}
    return layers


def _bottlenecks(model: Transformer, config: dict[str, Any], file: Path) -> Layers:
    """BOTTLENECK, which PEFT has not: our names and shapes."""
    tensors, places = read_header(file), linear_layers(model)
    layers: Layers = {}
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors):
        if name not in places:
            raise UserError(f"{file}: {name[:200]!r} is no linear layer of this {model.config.family} model")
        width = config.get("width")
        if type(width) is not int or not 0 < width <= MAX_RANK:
            raise UserError(f"{file.with_name(CONFIG)}: width must be a whole number from 1 to {MAX_RANK:,}")
        base, values = linear(model, name), {}
        out = base.out_features
        shapes = {"down": (width, out), "down_bias": (width,), "up": (out, width), "up_bias": (out,)}
        for kind, shape in shapes.items():
            if (tensor := tensors.pop(f"{name}.{kind}", None)) is None:
                raise UserError(f"{file}: {name}.{kind} is missing")
            _check_shape(tensor, shape)
            values[kind] = _read(tensor)
        dropout = float(config.get("dropout") or 0.0)
        layers[name] = BottleneckLinear(base, width, dropout, torch.Generator()), values
    if tensors or not layers:
        raise UserError(f"{file}: it holds {next(iter(tensors), 'no adapters')[:200]}, which is no adapter")
    return layers


def _load_virtual_tokens(model: Transformer, config: dict[str, Any], file: Path) -> list[str]:
    """PROMPT_TUNING and PREFIX_TUNING: one matrix, a row for each virtual token."""
    tensors = read_header(file)
    if list(tensors) != [PROMPT]:
        raise UserError(f"{file}: it must hold {PROMPT} and nothing else")
    tensor, per_layer = tensors[PROMPT], config["peft_type"] == "PREFIX_TUNING"
    count = config.get("num_virtual_tokens")
    if type(count) is not int or not 0 < count <= MAX_RANK:
        raise UserError(
            f"{file.with_name(CONFIG)}: num_virtual_tokens must be a whole number from 1 to {MAX_RANK:,}"
        )
    _check_shape(tensor, (count, VirtualTokens.width(model.config, per_layer)))
    return add_virtual_tokens(model, _read(tensor), per_layer)


def _match(
    model: Transformer, file: Path, kinds: list[str]
) -> list[tuple[StoredModule, dict[str, StoredTensor]]]:
    """(module, its tensors by kind), after checking that the file holds nothing else."""
    known = {stored.name: stored for stored in stored_modules(model.config).values()}
    layers = set(linear_layers(model))
    tensors = read_header(file)
    found: dict[str, tuple[StoredModule, dict[str, StoredTensor]]] = {}
    for name in tensors:
        inner = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, kinds))})", name)
        module = known.get(inner[1]) if inner else None
        if inner is None or module is None or not layers.issuperset(module.parts):
            raise UserError(
                f"{file}: the tensor {name[:200]!r} is no adapter of a linear layer in the blocks of this "
                f"{model.config.family} model (those are all that can be loaded)"
            )
        names = {kind: f"{PREFIX}{module.name}.{kind}" for kind in kinds}
        if missing := [other for other in names.values() if other not in tensors]:
            raise UserError(f"{file}: {name} is there, but not its other half, {missing[0]}")
        found[module.name] = module, {kind: tensors[other] for kind, other in names.items()}
    if not found:
        raise UserError(f"{file}: it holds no adapters")
    return list(found.values())


def _check_pair(module: StoredModule, a: StoredTensor, b: StoredTensor) -> None:
    for tensor in (a, b):
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            found = f"{tensor.dtype} {tensor.shape}"
            raise UserError(f"{tensor.file}: {tensor.name} is {found}, no matrix of floating-point numbers")
    rank, columns = a.shape
    rows = sum(module.rule.rows)
    if (columns, b.shape) != (module.rule.columns, (rows, rank)) or not 0 < rank <= MAX_RANK:
        raise UserError(
            f"{a.file}: the adapter of {module.name} has shapes {a.shape} and {b.shape}; "
            f"in this model they must be (r, {module.rule.columns}) and ({rows}, r)"
        )


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOATS or tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype} {tensor.shape}; for this model it must be "
            f"floating-point numbers of shape {shape}"
        )


def _alpha(config: dict[str, Any], module: str, rank: int, file: Path) -> float:
    """lora_alpha of a module, after checking the rank that the config claims."""
    claimed = of_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if claimed != rank:
        raise UserError(f"{file}: the adapter of {module} has rank {rank}; {CONFIG} says {claimed}")
    return of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))


def _read(tensor: StoredTensor) -> Tensor:
    """A stored tensor, refused if it holds a NaN or an infinity."""
    values = torch.cat([chunk.clone() for chunk in read_chunks(tensor)]).view(tensor.shape)
    if not values.isfinite().all():
        raise UserError(f"{tensor.file}: {tensor.name} holds NaN or infinite values")
    return values


def _cut(
    model: Transformer, module: StoredModule, a: Tensor, b: Tensor, magnitudes: list[Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """The values of each part's adapter.

    Ranks of a fused B that are zero in a part's rows are not that part's; a part that has none, and whose
    magnitudes are the lengths of its rows, has no adapter; unless that is all of them: none was trained yet.
    """
    values: dict[str, dict[str, Tensor]] = {}
    untouched: list[str] = []
    for index, (part, rows) in enumerate(zip(module.parts, module.rule.unstack(b), strict=True)):
        used = rows.any(0)
        at_rest = not used.any()
        if len(module.parts) == 1 or at_rest:
            used = torch.ones_like(used)
        values[part] = {"lora_a": a[used], "lora_b": rows[:, used]}
        if magnitudes is not None:
            values[part]["magnitude"] = magnitudes[index].flatten()
            base, found = dequantized(linear(model, part).weight), magnitudes[index].flatten().float()
            precision = 2 * torch.finfo(base.dtype).eps
            at_rest &= torch.allclose(row_lengths(base).float(), found, precision, 0)
        if at_rest:
            untouched.append(part)
    if len(untouched) < len(values):
        for part in untouched:
            del values[part]
    return values
