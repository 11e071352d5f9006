"""The parameters of a run, counted one by one without making any: which there are, which are trained."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from ropewalk.adapt.apply import PLACES
from ropewalk.layout import Layout
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_weights import weight_map
from ropewalk.ops import QUANTIZED
from ropewalk.parallel.slices import is_expert, sliced_along
from ropewalk.plan.blocks import block_shapes
from ropewalk.plan.work import Work

LOW_RANK = ("lora", "dora")


@dataclass(frozen=True)
class Parameter:
    """One parameter, or `count` of the same kind; names of a block's are those inside the block."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    quantized: Literal["none", "nf4", "int8"] = "none"
    count: int = 1

    @property
    def size(self) -> int:
        """Numbers in one of them."""
        return math.prod(self.shape)

    def quantized_bytes(self, numbers: int | None = None) -> tuple[int, int]:
        """Bytes of the codes of a quantized one, or of its rows of so many numbers, and of the constants."""
        rows, *others = self.shape
        rows = rows if numbers is None else numbers // math.prod(others)
        return QUANTIZED[self.quantized].part_bytes((rows, *others))


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model, as one process of a tensor group has them; a tied head is its embedding."""

    outside: tuple[Parameter, ...]
    """of embedding, last norm, head and virtual tokens"""
    blocks: tuple[tuple[Parameter, ...], ...]
    """layer by layer; equal layers share one tuple"""

    def __iter__(self) -> Iterator[Parameter]:
        """Each kind once: those of equal layers as one, with their count."""
        yield from self.outside
        layers = Counter(map(id, self.blocks))
        for block in {id(block): block for block in self.blocks}.values():
            for p in block:
                yield Parameter(p.name, p.shape, p.trained, p.quantized, p.count * layers[id(block)])


def parameters(work: Work) -> Parameters:
    """What `train.build` makes of this work."""
    config = work.config
    named = bool(work.freeze) or (work.targets != "all-linear" and any("." in t for t in work.targets))
    known: dict[bool, tuple[Parameter, ...]] = {}
    stored = _stored_names(config) if work.freeze or work.targets != "all-linear" else {}
    blocks = []
    for layer in range(config.num_hidden_layers):
        moe = layer in config.moe_layers
        if named or moe not in known:
            known[moe] = tuple(_sliced(p, work) for p in _block(work, layer, stored))
        blocks.append(known[moe])
    return Parameters(tuple(_sliced(p, work) for p in _outside(work, stored)), tuple(blocks))


def _outside(work: Work, stored: dict[str, str]) -> Iterator[Parameter]:
    config, hidden = work.config, work.config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        shapes["embed_positions.weight"] = (config.max_position_embeddings, hidden)
    shapes["norm.weight"] = (hidden,)
    if config.norm == "layer":
        shapes["norm.bias"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, hidden)
    for name, shape in shapes.items():
        yield Parameter(name, shape, _is_trained(work, name, stored))
    if work.method == "prompt":
        yield Parameter("virtual_tokens.embedding.weight", (work.tokens, hidden), True)
    if work.method == "prefix":
        width = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        yield Parameter("virtual_tokens.embedding.weight", (work.tokens, width), True)


def _block(work: Work, layer: int, stored: dict[str, str]) -> Iterator[Parameter]:
    config = work.config
    for name, shape, copies in block_shapes(config, layer in config.moe_layers):
        whole, matrix = f"blocks.{layer}.{name}", name.endswith("_proj.weight")
        quantized = work.quantize if matrix else "none"
        yield Parameter(name, shape, _is_trained(work, whole, stored), quantized, copies)
        module = name.removesuffix(".weight")
        if matrix and is_adapted(work, module, f"blocks.{layer}.{module}", stored):
            for kind, added in _adapter_shapes(work, module, *shape):
                yield Parameter(f"{module}.{kind}", added, True)


def is_adapted(work: Work, module: str, whole: str, stored: dict[str, str]) -> bool:
    """Whether an adapter stands at a linear layer: what `adapt.targets.select` chooses."""
    if work.method not in ("lora", "dora", "ia3", "bottleneck"):
        return False
    if work.config.moe_layers and not module.startswith("attention."):
        return False
    leaf = module.rpartition(".")[2]
    if work.targets == "all-linear":
        return work.method in LOW_RANK or leaf in PLACES[work.method]
    file_name = stored.get(f"{whole}.weight", "").removesuffix(".weight")
    return any(f".{name}".endswith(f".{target}") for target in work.targets for name in (whole, file_name))


def _adapter_shapes(
    work: Work, module: str, rows: int, columns: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if work.method in LOW_RANK:
        yield "lora_a", (work.rank, columns)
        yield "lora_b", (rows, work.rank)
        if work.method == "dora":
            yield "magnitude", (rows,)
    elif work.method == "ia3":
        yield "vector", (columns if module.endswith("down_proj") else rows,)
    else:
        yield "down", (work.rank, rows)
        yield "down_bias", (work.rank,)
        yield "up", (rows, work.rank)
        yield "up_bias", (rows,)


def _is_trained(work: Work, name: str, stored: dict[str, str]) -> bool:
    """Of a parameter of the plain model."""
    if work.method == "bitfit":
        return name.endswith(".bias")
    names = name, stored.get(name, name)
    return work.method == "full" and not any(fnmatchcase(n, p) for p in work.freeze for n in names)


def _stored_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter -> the one in the family's Hugging Face files."""
    return {part: rule.hf for rule in weight_map(config) for part in rule.parts}


def _sliced(parameter: Parameter, work: Work) -> Parameter:
    """What a process of a tensor group, or of an expert group, has of it."""
    if is_expert(parameter.name):
        return replace(parameter, count=max(1, parameter.count // work.layout.expert))
    dim = sliced_along(parameter.name) if work.layout.tensor > 1 else None
    if dim is None:
        return parameter
    shape = list(parameter.shape)
    shape[dim] = -(-shape[dim] // work.layout.tensor)
    return replace(parameter, shape=tuple(shape))


def part_of(parameter: Parameter, layout: Layout) -> int:
    """Numbers that the process with most has of it: rows of the first dimension."""
    apart = layout.expert > 1 and is_expert(parameter.name)
    parts = layout.expert_parts if apart else layout.parts
    if parts == 1 or not parameter.shape:
        return parameter.size
    rows = parameter.shape[0]
    return -(-rows // parts) * (parameter.size // rows) if rows else 0
