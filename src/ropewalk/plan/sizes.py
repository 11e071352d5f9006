"""The sizes of a model for the planner, from whatever says them; how many weights it has, and what they
compute."""

import math
from collections.abc import Mapping
from typing import Any

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.plan.blocks import attended, block_products, block_shapes, layer_kinds
from ropewalk.plan.inputs import counted
from ropewalk.plan.work import Work

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MIXTURE = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
GATED = ("silu", "swish", "swiglu", "geglu", "gelu_pytorch_tanh")


def config_from(model: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig, or one made of Hugging Face fields.

    With `model_type` the fields are read as that family's. Without it only sizes are needed; the MLP is gated
    if `mlp_gated` or `gated` says so, or its activation (silu) or an inner size other than four times the
    width do. UserError where a field is missing, is no number above 0, or does not fit the others.
    """
    if isinstance(model, ModelConfig):
        return model
    if not isinstance(model, Mapping):
        raise UserError("the model: give a ModelConfig or a dictionary of Hugging Face fields")
    if "model_type" in model:
        from ropewalk.model import config_from_fields  # the families' table; it imports torch

        return config_from_fields(dict(model))
    missing = [name for name in NEEDED if name not in model]
    if missing:
        raise UserError(f"the model lacks {', '.join(missing)}; a planner needs {', '.join(NEEDED)}")
    for name in model:
        if "expert" in str(name) and name not in MIXTURE and model[name]:
            raise UserError(f"the model's {name}: not known here; a mixture is said by {', '.join(MIXTURE)}")

    def size(name: str, default: int | None = None) -> int:
        value = model.get(name)
        return counted(default if value is None and default is not None else value, f"the model's {name}")

    h, layers, heads, vocabulary = (size(name) for name in NEEDED)
    inner = size("intermediate_size", 4 * h)
    kv = size("num_key_value_heads", heads)
    if "head_dim" not in model and h % heads:
        raise UserError(
            f"the model: hidden_size {h} is no multiple of num_attention_heads {heads}; give head_dim"
        )
    if heads % kv:
        raise UserError(f"the model: num_attention_heads {heads} is no multiple of num_key_value_heads {kv}")
    gated = model.get("mlp_gated", model.get("gated"))
    if gated is None:
        gated = model.get("hidden_act") in GATED or ("hidden_act" not in model and inner != 4 * h)
    kind = "num_experts" if model.get("num_experts") else "num_local_experts"
    experts = size(kind) if model.get(kind) else 0
    chosen = size("num_experts_per_tok") if experts else 0
    if chosen > experts:
        raise UserError(f"the model: num_experts_per_tok {chosen} is more than its {experts} experts")
    return ModelConfig(
        family="llama" if gated else "gpt2",
        vocab_size=vocabulary,
        hidden_size=h,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=size("head_dim", h // heads),
        max_position_embeddings=size("max_position_embeddings", 2048),
        position="rope" if gated else "learned",
        norm="rms" if gated else "layer",
        mlp_gated=bool(gated),
        hidden_act="silu" if gated else "gelu",
        qkv_bias=not gated,
        o_bias=not gated,
        mlp_bias=not gated,
        tie_word_embeddings=bool(model.get("tie_word_embeddings", not gated)),
        moe_layers=tuple(range(layers)) if experts else (),
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=size("moe_intermediate_size", inner) if experts else 0,
    )


def parameters(config: ModelConfig) -> int:
    """All weights: matrices, norms, biases, embeddings; a tied head counts once."""
    blocks = sum(
        count * sum(math.prod(shape) * copies for _, shape, copies in block_shapes(config, moe))
        for moe, _, count in layer_kinds(config)
    )
    last_norm = config.hidden_size * (2 if config.norm == "layer" else 1)
    return blocks + last_norm + end_weights(config)


def end_weights(config: ModelConfig) -> int:
    """Embedding, learned positions, and the head where it is not the embedding."""
    positions = config.max_position_embeddings if config.position == "learned" else 0
    ends = 1 if config.tie_word_embeddings else 2
    return (ends * config.vocab_size + positions) * config.hidden_size


def step_flops(work: Work, *, causal: bool = True, recomputed: bool = False) -> float:
    """FLOPs of an optimizer step over all devices: a multiply-add is 2, products only.

    causal: the (query, key) pairs that are really attended; else all of a row's, as Megatron-LM counts (arXiv
    2205.05198, equation 7). recomputed: with what checkpointing does twice (hardware FLOPs).
    """
    config, tokens = work.config, work.step_tokens
    frozen = work.method != "full"
    span = 4 * config.num_attention_heads * config.head_dim * work.batch_size
    weights = pairs = 0.0
    for moe, window, count in layer_kinds(config):
        weights += count * sum(m * n * k * c for m, n, k, c in block_products(config, moe, tokens))
        pairs += count * attended(work.sequence_length, window, work.document_length, fused=causal)
    head = config.vocab_size * config.hidden_size * tokens * work.scored
    total = (4 if frozen else 6) * (weights + head) + 3 * span * pairs
    if recomputed:
        share = work.recomputed_share
        if work.checkpointing == "full" or work.checkpointing_budget is not None:
            total += share * (2 * weights + span * pairs)
        elif work.checkpointing == "selective" and not work.fused_attention:
            total += share * span * pairs
    return total
