"""Weights of a Hugging Face directory into a Transformer, piece by piece.

The model is built without memory, each parameter is allocated once in its final dtype, and what is read goes
straight into it: the peak is the model itself and one small buffer. Parameters are private memory, never
pages of the file, so that training may change them in place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ropewalk.errors import UserError
from ropewalk.files import read_json_object
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_config import config_from_hf
from ropewalk.model.families_weights import WeightRule, stored_name, weight_map
from ropewalk.model.safetensors_file import FLOATS, StoredTensor, read_chunks, read_header
from ropewalk.model.source import base_of_adapter, resolve_source
from ropewalk.model.transformer import Transformer
from ropewalk.ops import QUANTIZED, Linear

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    quantize: Literal["none", "nf4", "int8"] = "none",
) -> Transformer:
    """The model that `source` names (see `resolve_source`), in evaluation mode.

    With `quantize` the linear weights of the blocks are held in 4 or 8 bits (NF4Tensor, Int8Tensor), frozen,
    each as soon as it is read: there are never all of them in 16 bits.

    Of a LoRA run it is the base model with the adapter merged into its weights. Raises UserError, naming the
    file, when weights are missing, superfluous, of the wrong shape, damaged, not finite or pickled.
    """
    known = dtype in _DTYPES if isinstance(dtype, str) else dtype.is_floating_point
    if not known:
        raise UserError(f"dtype {dtype!r} is not supported; these are: {', '.join(_DTYPES)}")
    device = _device(device)
    if quantize != "none" and quantize not in QUANTIZED:
        raise UserError(f"quantize {quantize!r} is not supported; these are: none, {', '.join(QUANTIZED)}")
    directory = resolve_source(source, revision)
    base = base_of_adapter(directory)
    if base is not None:
        from ropewalk.adapt import load_adapter, merge  # adapt builds on this room

        model = load_model(base[0], dtype, device, base[1], quantize)
        load_adapter(model, directory)
        merge(model, requantize=quantize != "none")
        return model.eval()
    config = read_config(directory)
    matched = _match(config, directory)
    with torch.device("meta"):
        model = Transformer(config)
    model.to(_DTYPES[dtype] if isinstance(dtype, str) else dtype)
    to_quantize = _take_linear_weights(model) if quantize != "none" else {}
    # not to_empty(): the first empty_like() of a meta tensor imports sympy, half a second and 50 MB
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for rule, stored in matched:
            if to_quantize.keys().isdisjoint(rule.parts):
                _fill(rule, stored, [parameters[name] for name in rule.parts])
                continue
            values = _read(stored, torch.empty(rule.shape, dtype=model.embed.weight.dtype))
            for name, part in zip(rule.parts, rule.split(values), strict=True):
                quantized = QUANTIZED[quantize].quantize(part.to(device))
                to_quantize[name].weight = nn.Parameter(quantized, requires_grad=False)
    return model.eval()


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is not known; write cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: there is no CUDA device here")
    return found


def _take_linear_weights(model: Transformer) -> dict[str, nn.Linear]:
    """Removes the weights to be quantized; parameter name -> its module. (Routers and embeddings stay.)"""
    found: dict[str, nn.Linear] = {
        f"{name}.weight": module
        for name, module in model.blocks.named_modules(prefix="blocks")
        if isinstance(module, Linear)
    }
    for module in found.values():
        module.register_parameter("weight", None)
    return found


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig in a Hugging Face directory; raises UserError naming the file.

    What ends a sequence is taken from generation_config.json where there is one: it often knows more.
    """
    path, generation = directory / "config.json", directory / "generation_config.json"
    config = config_from_hf(read_json_object(path), str(path))
    eos = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    if eos is None:
        return config
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise UserError(
            f"{generation}: eos_token_id is {eos!r}, not ids of the model's {config.vocab_size} tokens"
        )
    return replace(config, eos_token_id=tuple(ids) if isinstance(eos, list) else eos)


def _match(config: ModelConfig, directory: Path) -> list[tuple[WeightRule, StoredTensor]]:
    """What fills each weight, after checking that the files hold the model that the config describes."""
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(directory):
        for name, tensor in read_header(file).items():
            wanted = stored_name(config, name)
            if wanted is None:
                continue
            if wanted in stored:
                raise UserError(f"{file}: the tensor {name} is also in {stored[wanted].file.name}")
            stored[wanted] = tensor
    rules = matching_rules(config, {name: (t.shape, t.file) for name, t in stored.items()}, directory)
    for rule in rules:
        tensor = stored[rule.hf]
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{tensor.file}: {rule.hf} is stored as {tensor.dtype}; only unquantized weights "
                f"({', '.join(FLOATS)}) can be loaded"
            )
    return [(rule, stored[rule.hf]) for rule in rules]


def matching_rules(
    config: ModelConfig, found: Mapping[str, tuple[tuple[int, ...], Path]], where: Path
) -> list[WeightRule]:
    """The rules of the model's weights, once `found` (shape and file by name) is known to hold just them."""
    # Config and files may be lying: what has more parts than there are tensors must not be spelled out.
    if max(config.num_hidden_layers, len(config.moe_layers) * config.num_experts) > len(found):
        raise UserError(
            f"{where}: {len(found):,} tensors are too few for the model that its config describes"
        )
    rules = weight_map(config)
    for rule in rules:
        if rule.hf not in found:
            raise UserError(f"{where}: the tensor {rule.hf} is missing; copy or download the model again")
        shape, file = found[rule.hf]
        if shape != rule.shape:
            raise UserError(
                f"{file}: {rule.hf} has the shape {shape}; the model's config makes it {rule.shape}"
            )
    if unknown := sorted(found.keys() - {rule.hf for rule in rules}):
        some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{where}: a {config.family} model of its config has no such tensors: {some}")
    return rules


def _weight_files(directory: Path) -> Sequence[Path]:
    """The safetensors file, or all shards that the index lists."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise UserError(
                f"{directory}: its weights are pickled (.bin, .pt), and a pickle can run code; "
                "convert them to safetensors where you trust them, or take another revision"
            )
        raise UserError(f"{directory}: it has no weights (model.safetensors or model.safetensors.index.json)")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not a safetensors index; copy or download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: it names {name!r}, which is not a file beside it")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: this shard is missing; copy or download it again")
    return [directory / name for name in sorted(names)]


def _fill(rule: WeightRule, stored: StoredTensor, parts: list[nn.Parameter]) -> None:
    """Reads one stored tensor into the parameters that it consists of."""
    if len(parts) == 1 and not rule.transposed and parts[0].device.type == "cpu":
        _read(stored, parts[0].data)
        return
    # cutting it up, and one transfer to a GPU, need all of it, in the dtype of the model
    values = _read(stored, torch.empty(rule.shape, dtype=parts[0].dtype))
    for part, piece in zip(parts, rule.split(values), strict=True):
        part.data.copy_(piece)


def _read(stored: StoredTensor, target: torch.Tensor) -> torch.Tensor:
    """`target`, contiguous and on the CPU, filled with what is stored; UserError if that is not finite."""
    flat, at = target.view(-1), 0
    for chunk in read_chunks(stored):
        values = chunk.to(flat.dtype)
        if not _finite(values):
            raise UserError(f"{stored.file}: {stored.name} holds NaN or infinite values; the model is broken")
        flat[at : at + len(values)].copy_(values)
        at += len(values)
    return target


def _finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass (NaN is the minimum and maximum of what holds it)."""
    least, greatest = torch.aminmax(values)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
