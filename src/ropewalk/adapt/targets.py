"""Which linear layers of a model can carry an adapter, and their names here and in Hugging Face files."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_weights import WeightRule, weight_map
from ropewalk.model.transformer import Transformer


def linear_layers(model: Transformer) -> list[str]:
    """Names of the linear layers that can be adapted: in the blocks, or their attention beside experts.

    transformers keeps the experts of a layer in one tensor, which is no linear layer to PEFT, and peft (0.21)
    reads even the plain MLPs of such a model as experts.
    """
    room = ".attention." if model.config.moe_layers else "."
    return [
        name
        for name, module in model.blocks.named_modules(prefix="blocks")
        if isinstance(module, nn.Linear) and room in name
    ]


def left_out(model: Transformer) -> str | None:
    """One sentence on what adapters of linear layers leave out of a mixture of experts; else None."""
    if not model.config.moe_layers or not any(name.endswith(".base") for name, _ in model.named_modules()):
        return None
    matrices = sum(".mlp." in name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return (
        f"{matrices:,} matrices of experts, routers and MLPs are not adapted: PEFT has no linear layers there"
    )


def select(
    model: Transformer, targets: Literal["all-linear"] | Sequence[str], places: Sequence[str] | None = None
) -> list[str]:
    """The linear layers that `targets` names, in the model's order; "all-linear": all, or those in `places`.

    A target is the end of a layer's name, in whole parts, here or in the family's Hugging Face files: q_proj,
    self_attn.q_proj, qkv_proj (phi3: the three of them), blocks.0.attention.q_proj. Raises UserError for one
    that names nothing, listing what there is.
    """
    layers = linear_layers(model)
    if targets == "all-linear":
        return [name for name in layers if places is None or name.rpartition(".")[2] in places]
    if isinstance(targets, str):
        targets = [targets]
    stored = stored_modules(model.config)
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in layers if _ends(name, target) or _ends(stored[name].name, target)}
        if not found:
            raise UserError(_unknown(model, target, layers))
        chosen |= found
    if not chosen:
        raise UserError("adapt.targets is empty; name linear layers, or write all-linear")
    return [name for name in layers if name in chosen]


class StoredModule:
    """A module of the Hugging Face model: its name, and the rule for its weight."""

    def __init__(self, rule: WeightRule) -> None:
        self.rule = rule
        self.name = rule.hf.removesuffix(".weight")
        self.parts = tuple(part.removesuffix(".weight") for part in rule.parts)


def stored_modules(config: ModelConfig) -> dict[str, StoredModule]:
    """Our module name -> the Hugging Face module that holds its weight; fused ones are shared by several."""
    rules = [rule for rule in weight_map(config) if rule.hf.endswith(".weight")]
    return {part: stored for stored in map(StoredModule, rules) for part in stored.parts}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _unknown(model: Transformer, target: str, layers: Sequence[str]) -> str:
    """Why a target cannot be adapted, or that there is no such layer."""
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers and _ends(name, target)
    ]
    stored = stored_modules(model.config)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    leaves |= dict.fromkeys(stored[name].name.rpartition(".")[2] for name in layers)
    there = f"this {model.config.family} model has {', '.join(leaves)}; or write all-linear"
    if others:
        return f"adapt.targets: {target!r} ({others[0]}) cannot carry an adapter; {there}"
    return f"adapt.targets: there is no linear layer {target!r}; {there}"
