"""The ops room: the few operations that are worth more than a line of torch, each beside its plain reference.

In: tensors and numbers. Out: tensors. May import torch and ropewalk.errors.
"""

from ropewalk.ops.attention import attention, attention_cached, attention_reference, cached_mask
from ropewalk.ops.attention_layout import AttentionLayout
from ropewalk.ops.attention_parts import RowPart
from ropewalk.ops.gated import gated_silu, gated_silu_reference
from ropewalk.ops.head import VocabularyPart
from ropewalk.ops.int8 import Int8Tensor
from ropewalk.ops.linear import Linear
from ropewalk.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ropewalk.ops.linear_kl import linear_kl, linear_kl_reference, linear_kl_top_k, linear_kl_top_k_reference
from ropewalk.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
from ropewalk.ops.lora import lora_linear, lora_linear_reference
from ropewalk.ops.nf4 import NF4Tensor
from ropewalk.ops.norm import rms_norm, rms_norm_reference
from ropewalk.ops.quantized import QuantizedTensor, quantized_linear
from ropewalk.ops.reference import references, using_references
from ropewalk.ops.rope import apply_rope, rope_frequencies, rope_tables

QUANTIZED: dict[str, type[QuantizedTensor]] = {"nf4": NF4Tensor, "int8": Int8Tensor}
"""The kinds of frozen weights in few bits, under their names in recipes."""

__all__ = [
    "QUANTIZED",
    "AttentionLayout",
    "Int8Tensor",
    "Linear",
    "NF4Tensor",
    "QuantizedTensor",
    "RowPart",
    "VocabularyPart",
    "apply_rope",
    "attention",
    "attention_cached",
    "attention_reference",
    "cached_mask",
    "gated_silu",
    "gated_silu_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_kl",
    "linear_kl_reference",
    "linear_kl_top_k",
    "linear_kl_top_k_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "lora_linear",
    "lora_linear_reference",
    "quantized_linear",
    "references",
    "rms_norm",
    "rms_norm_reference",
    "rope_frequencies",
    "rope_tables",
    "using_references",
]
