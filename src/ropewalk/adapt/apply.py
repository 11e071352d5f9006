"""Putting adapters on a model, and taking them off again."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from ropewalk.adapt.layers import AdaptedLinear, BottleneckLinear, IA3Linear, adapted_layers, plain_weight
from ropewalk.adapt.lora import DoRALinear, LoRALinear
from ropewalk.adapt.targets import select
from ropewalk.errors import UserError
from ropewalk.model.cache import KVCache
from ropewalk.model.families_weights import weight_map
from ropewalk.model.transformer import Transformer
from ropewalk.model.virtual import VirtualTokens
from ropewalk.ops import QUANTIZED, Linear, QuantizedTensor


@dataclass(frozen=True)
class AdapterConfig:
    """What to train beside a frozen model; docs/adapt.md compares the methods.

    `targets` "all-linear" stands for all layers that the method is meant for: with ia3 and bottleneck those
    of their papers (`PLACES`). `rank` is also the width of bottleneck adapters, `tokens` the number of
    virtual tokens of prompt and prefix tuning.
    """

    method: Literal["lora", "dora", "prompt", "prefix", "bottleneck", "ia3", "bitfit"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rank_stabilized: bool = False
    tokens: int = 20


PLACES = {"ia3": ("k_proj", "v_proj", "down_proj"), "bottleneck": ("o_proj", "down_proj")}
"""Where the papers put them; low-rank adapters go to every linear layer."""


def apply_adapter(model: Transformer, config: AdapterConfig, seed: int = 0) -> list[str]:
    """Freezes the model and adds what `config` trains, in place; the names of the modules adapted.

    For bitfit, which adds nothing, the names of the parameters trained. First values depend only on `seed`,
    the config and the model. Raises UserError for an unknown target, for a model that carries adapters
    already, and for bitfit on a model that has no biases.
    """
    check_plain(model)
    if config.rank < 1:
        raise UserError(f"adapt.rank is {config.rank}; it must be at least 1")
    if config.method in ("prompt", "prefix") and not 0 < config.tokens < model.context_length:
        raise UserError(
            f"adapt.tokens is {config.tokens}; this model has {model.context_length} positions for them "
            "and the texts after them"
        )
    if config.method == "bitfit":
        return _train_biases(model)
    generator = torch.Generator().manual_seed(seed)
    if config.method in ("prompt", "prefix"):
        return add_virtual_tokens(model, *_first_rows(model, config, generator))
    names = select(model, config.targets, PLACES.get(config.method))
    put_on(model, {name: _layer(linear(model, name), name, config, generator) for name in names})
    return names


def _layer(base: nn.Linear, name: str, config: AdapterConfig, generator: torch.Generator) -> AdaptedLinear:
    if config.method == "ia3":
        return IA3Linear(base, on_input=name.endswith("down_proj"))
    if config.method == "bottleneck":
        return BottleneckLinear(base, config.rank, config.dropout, generator)
    kind = DoRALinear if config.method == "dora" else LoRALinear
    return kind(base, config.rank, config.alpha, config.dropout, generator, config.rank_stabilized)


def _train_biases(model: Transformer) -> list[str]:
    """BitFit (arXiv 2106.10199): all biases and nothing else, in place."""
    names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if not names:
        raise UserError(
            f"adapt.method: bitfit trains biases, and this {model.config.family} model has none; take lora"
        )
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


@torch.no_grad()
def _first_rows(model: Transformer, config: AdapterConfig, generator: torch.Generator) -> tuple[Tensor, bool]:
    """First values of virtual tokens, of real ones drawn at random: a start that the model has seen before.

    For prompt tuning their embeddings, for prefix tuning the keys and values that the model makes of them.
    """
    ids = torch.randint(model.config.vocab_size, (1, config.tokens), generator=generator)
    ids = ids.to(model.embed.weight.device)
    if config.method == "prompt":
        return model.embedded(ids)[0], False
    cache = KVCache(model.config, 1, config.tokens, model.embed.weight.dtype, ids.device)
    model(ids, cache=cache)
    pairs = [torch.stack((k[0], v[0])) for k, v in zip(cache.keys, cache.values, strict=True)]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(config.tokens, -1), True


def add_virtual_tokens(model: Transformer, rows: Tensor, per_layer: bool) -> list[str]:
    """Freezes the model and lets virtual tokens of these values stand before every document, in place."""
    model.requires_grad_(False)
    weight = model.embed.weight
    rows = rows.to(device=weight.device, dtype=weight.dtype, copy=True)
    model.virtual_tokens = VirtualTokens(model.config, rows, per_layer)
    return unmerged(model)


def linear(model: Transformer, name: str) -> nn.Linear:
    """The linear layer of this name."""
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    return base


def put_on(model: Transformer, layers: dict[str, AdaptedLinear]) -> None:
    """Freezes the model and puts adapted layers in the place of their bases, in place."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
        model.set_submodule(name, layer, strict=True)


def check_plain(model: Transformer) -> None:
    """Raises UserError for a model that carries adapters."""
    if carrying := unmerged(model):
        raise UserError(f"the model carries adapters already ({carrying[0]}, ...); merge them first")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name. None without adapters: bitfit trains the model's own parameters."""
    found = {
        f"{name}.{kind}": parameter
        for name, layer in adapted_layers(model)
        for kind, parameter in layer.named_parameters(recurse=False)
    }
    tokens = {name: p for name, p in model.named_parameters() if name.startswith("virtual_tokens.")}
    return found | tokens


def unmerged(model: nn.Module) -> list[str]:
    """Names of the modules that are adapters: what `save_adapter` saves and a plain model has not."""
    tokens = ["virtual_tokens"] * (getattr(model, "virtual_tokens", None) is not None)
    return [name for name, _ in adapted_layers(model)] + tokens


def rate_factors(model: nn.Module, ratio: float) -> dict[str, float]:
    """LoRA+ (arXiv 2402.12354): `ratio` for each B, whose learning rate is so many times that of all else."""
    return {name: ratio for name in adapter_parameters(model) if name.endswith(".lora_b")}


def merge(model: Transformer, requantize: bool = False) -> list[str]:
    """Works the adapters into the weights and takes them away, in place; nothing stays frozen.

    Merged weights have the base's dtype: in float32 the logits stay within rounding, in bfloat16 the sum is
    rounded to bfloat16. A quantized base becomes a plain one of its dtype throughout, or with `requantize` is
    quantized again, layer by layer, and stays frozen: smaller, but not quite what was trained.
    Returns the names of what cannot be merged and stays, working as before: bottleneck adapters and virtual
    tokens.
    """
    for name, layer in list(adapted_layers(model)):
        kind = type(layer.base.weight)
        merged = layer.merged()
        if merged is not None:
            model.set_submodule(name, merged, strict=True)
            if requantize and issubclass(kind, QuantizedTensor):
                _quantize(merged, kind)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not requantize:
            plain_weight(module)
    for parameter in model.parameters():
        parameter.requires_grad_(not isinstance(parameter, QuantizedTensor))
    return unmerged(model)


def quantize_base(
    model: Transformer, names: Sequence[str] | None = None, kind: Literal["nf4", "int8"] = "nf4"
) -> list[str]:
    """Holds the frozen linear weights of the blocks in few bits, in place; their names.

    In 4 (NF4, arXiv 2305.14314) or in 8 with a scale for each row (arXiv 2208.07339); those already quantized
    stay as they are.

    `names`: only these layers. Routers of experts stay as they are: they are small, and a rounded one sends
    tokens elsewhere. Magnitudes of DoRA are not touched: quantize before they are made, or train on.
    """
    if kind not in QUANTIZED:
        raise UserError(f"kind {kind}: one of {', '.join(QUANTIZED)}")
    quantized = []
    for name, module in model.blocks.named_modules(prefix="blocks"):
        name = name.removesuffix(".base")
        if not isinstance(module, Linear) or (names is not None and name not in names):
            continue
        if not module.weight.requires_grad and not isinstance(module.weight, QuantizedTensor):
            _quantize(module, QUANTIZED[kind])
            quantized.append(name)
    return quantized


def _quantize(module: nn.Linear, kind: type[QuantizedTensor]) -> None:
    module.weight = nn.Parameter(kind.quantize(module.weight), requires_grad=False)


def freeze(model: Transformer, patterns: Sequence[str]) -> list[str]:
    """Stops the training of all parameters that a shell-style pattern names, in place; their names.

    Names are those here or in the family's Hugging Face files, of which a fused one stands for all its parts.
    Raises UserError for a pattern that names nothing, and if nothing is left to train.
    """
    stored = {part: rule.hf for rule in weight_map(model.config) for part in rule.parts}
    parameters = dict(model.named_parameters())
    frozen: dict[str, None] = {}
    for pattern in patterns:
        found = [
            name
            for name in parameters
            if fnmatchcase(plain := name.replace(".base.", "."), pattern)
            or fnmatchcase(stored.get(plain, plain), pattern)
        ]
        if not found:
            some = (*list(parameters)[:3], "...", *list(stored.values())[:3], "...")
            raise UserError(
                f"adapt.freeze: no parameter is named {pattern!r}; a {model.config.family} model has, here "
                f"and in Hugging Face files, {', '.join(some)}"
            )
        frozen |= dict.fromkeys(found)
    if not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise UserError("adapt.freeze: these patterns leave nothing to train; freeze less")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return list(frozen)
