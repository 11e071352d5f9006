"""Weight names and shapes, exactly and both ways: one rule for each tensor of a Hugging Face file.

Loading, saving and PEFT export all go through `weight_map`: a rule says of which of our tensors one
stored tensor consists, and cuts it up or puts it together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ropewalk.model.config import ModelConfig
from ropewalk.model.families import FAMILIES


@dataclass(frozen=True)
class WeightRule:
    """One stored tensor and the tensors of ours whose rows it holds."""

    hf: str
    """Its name in the file."""
    parts: tuple[str, ...]
    """Our parameter names, in the order of their rows; one unless the family fuses."""
    rows: tuple[int, ...]
    """Rows (dimension 0 of our tensor) of each part."""
    columns: int | None
    """Dimension 1; None for vectors."""
    transposed: bool = False
    """Stored as [columns, rows] (gpt2)."""
    groups: int = 1
    """Rows come in so many equal groups, each holding its share of every part (gpt_neox: one per head)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        rows = sum(self.rows)
        if self.columns is None:
            return (rows,)
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def split(self, stored: Tensor) -> list[Tensor]:
        """The parts of a stored tensor, in our layout; views where the layout allows it."""
        return self.unstack(stored.t() if self.transposed else stored)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The stored tensor from its parts; the inverse of `split`."""
        rows = self.stack(parts)
        return rows.t() if self.transposed else rows

    def unstack(self, rows: Tensor) -> list[Tensor]:
        """Cut dimension 0 into the parts' rows, undoing the grouping. Works for any number of columns."""
        if len(self.parts) == 1:
            return [rows]
        if self.groups == 1:
            return list(rows.split(self.rows))
        grouped = rows.unflatten(0, (self.groups, -1))
        return [part.flatten(0, 1) for part in grouped.split([n // self.groups for n in self.rows], dim=1)]

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of the parts as the stored tensor orders them; the inverse of `unstack`."""
        if len(parts) == 1:
            return parts[0]
        if self.groups == 1:
            return torch.cat(list(parts))
        return torch.cat([p.unflatten(0, (self.groups, -1)) for p in parts], dim=1).flatten(0, 1)


def weight_map(config: ModelConfig) -> list[WeightRule]:
    """A rule for every tensor of the model's Hugging Face file, in the order of the model.

    Every parameter of `Transformer(config)` is a part of exactly one rule. A tied head has none.
    """
    family = FAMILIES[config.family]
    stored: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for layer, module, shapes in _modules(config):
        prefix, hf = "", _hf_module(family.names, module)
        if layer is not None:
            prefix, hf = f"blocks.{layer}.", f"{family.names['block'].format(i=layer)}.{hf}"
        for kind, shape in shapes.items():
            stored.setdefault(f"{hf}.{kind}", []).append((f"{prefix}{module}.{kind}", shape))
    rules: list[WeightRule] = []
    for hf, parts in stored.items():
        (first, (_, *columns)), many = parts[0], len(parts) > 1
        rules.append(
            WeightRule(
                hf=hf,
                parts=tuple(name for name, _ in parts),
                rows=tuple(shape[0] for _, shape in parts),
                columns=columns[0] if columns else None,
                transposed=family.transposed and bool(columns) and first.startswith("blocks."),
                groups=config.num_attention_heads if many and family.by_head else 1,
            )
        )
    return rules


def stored_name(config: ModelConfig, name: str) -> str | None:
    """The name that `weight_map` uses for a tensor found in a file; None for one that is no weight.

    Files of a base model lack the family's prefix, old ones hold buffers, and tied ones may repeat the head.
    """
    family = FAMILIES[config.family]
    head = family.names["head"]
    if name == "lm_head.weight":  # what transformers 5 calls gpt_neox's embed_out in memory
        name = f"{head}.weight"
    if name.endswith(family.ignored) or (config.tie_word_embeddings and name == f"{head}.weight"):
        return None
    return name if name.startswith((family.prefix, f"{head}.")) else family.prefix + name


def _hf_module(names: dict[str, str], module: str) -> str:
    head, _, rest = module.partition("mlp.experts.")
    if head or not rest:
        return names[module]
    expert, _, projection = rest.partition(".")
    return names[f"mlp.experts.{projection}"].format(e=expert)


Shapes = dict[str, tuple[int, ...]]
"""`weight` and `bias` of one module, where it has them."""


def _modules(config: ModelConfig) -> Iterator[tuple[int | None, str, Shapes]]:
    """(layer, module name in the block or model, shapes) for every module that has parameters."""
    hidden = config.hidden_size
    norm = _norm_shapes(config, hidden)
    yield None, "embed", {"weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        yield None, "embed_positions", {"weight": (config.max_position_embeddings, hidden)}
    for layer in range(config.num_hidden_layers):
        for name, shapes in _block_shapes(config, layer in config.moe_layers).items():
            yield layer, name, shapes
    yield None, "norm", norm
    if not config.tie_word_embeddings:
        yield None, "head", {"weight": (config.vocab_size, hidden)}


def _norm_shapes(config: ModelConfig, size: int) -> Shapes:
    return {"weight": (size,), "bias": (size,)} if config.norm == "layer" else {"weight": (size,)}


def _linear(rows: int, columns: int, bias: bool = False) -> Shapes:
    return {"weight": (rows, columns), "bias": (rows,)} if bias else {"weight": (rows, columns)}


def _block_shapes(config: ModelConfig, moe: bool = False) -> dict[str, Shapes]:
    """The modules of one block, in order."""
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    norm = _norm_shapes(config, hidden)
    shapes: dict[str, Shapes] = {}
    if config.norm_placement != "post":
        shapes["attention_norm"] = norm
    shapes |= {
        "attention.q_proj": _linear(q, hidden, config.qkv_bias),
        "attention.k_proj": _linear(kv, hidden, config.qkv_bias),
        "attention.v_proj": _linear(kv, hidden, config.qkv_bias),
        "attention.o_proj": _linear(hidden, q, config.o_bias),
    }
    if config.qk_norm is not None:
        whole = config.qk_norm == "projection"
        shapes["attention.q_norm"] = {"weight": (q if whole else dim,)}
        shapes["attention.k_norm"] = {"weight": (kv if whole else dim,)}
    if config.norm_placement != "pre":
        shapes["post_attention_norm"] = norm
    if config.norm_placement != "post":
        shapes["mlp_norm"] = norm
    if moe:
        shapes["mlp.router"] = _linear(config.num_experts, hidden)
        for e in range(config.num_experts):
            for name, shape in _mlp_shapes(config, config.moe_intermediate_size).items():
                shapes[f"mlp.experts.{e}.{name}"] = shape
    else:
        for name, shape in _mlp_shapes(config, config.intermediate_size).items():
            shapes[f"mlp.{name}"] = shape
    if config.norm_placement != "pre":
        shapes["post_mlp_norm"] = norm
    return shapes


def _mlp_shapes(config: ModelConfig, size: int) -> dict[str, Shapes]:
    hidden, bias = config.hidden_size, config.mlp_bias
    gate = {"gate_proj": _linear(size, hidden, bias)} if config.mlp_gated else {}
    return gate | {"up_proj": _linear(size, hidden, bias), "down_proj": _linear(hidden, size, bias)}
