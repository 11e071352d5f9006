"""The ops room: the few operations that are worth more than a line of torch, each beside its plain reference.

In: tensors and numbers. Out: tensors. May import torch and ropewalk.errors.
"""

from ropewalk.ops.attention import (
    AttentionLayout,
    attention,
    attention_cached,
    attention_reference,
    cached_mask,
)
from ropewalk.ops.linear import Linear
from ropewalk.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ropewalk.ops.lora import lora_linear, lora_linear_reference
from ropewalk.ops.norm import rms_norm, rms_norm_reference
from ropewalk.ops.rope import apply_rope, rope_frequencies, rope_tables

__all__ = [
    "AttentionLayout",
    "Linear",
    "apply_rope",
    "attention",
    "attention_cached",
    "attention_reference",
    "cached_mask",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "lora_linear",
    "lora_linear_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_frequencies",
    "rope_tables",
]
