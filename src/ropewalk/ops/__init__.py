"""The ops room: the few operations that are worth more than a line of torch, each beside its plain reference.

In: tensors and numbers. Out: tensors. May import torch only.
"""

from ropewalk.ops.attention import AttentionLayout, attention, attention_cached, attention_reference, cached_mask
from ropewalk.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ropewalk.ops.norm import rms_norm, rms_norm_reference
from ropewalk.ops.rope import apply_rope, rope_frequencies, rope_tables

__all__ = [
    "AttentionLayout",
    "apply_rope",
    "attention",
    "attention_cached",
    "attention_reference",
    "cached_mask",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope_frequencies",
    "rope_tables",
]
