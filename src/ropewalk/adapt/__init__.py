"""The adapt room: what makes a model cheap to train.

In: a Transformer, or an adapter directory. Out: the same Transformer with adapters in it, or merged.
May import ropewalk.model, ropewalk.ops, ropewalk.files and ropewalk.errors.
"""

from ropewalk.adapt.apply import (
    AdapterConfig,
    adapter_parameters,
    apply_adapter,
    freeze,
    merge,
    quantize_base,
    rate_factors,
    unmerged,
)
from ropewalk.adapt.lora import DoRALinear, LoRALinear
from ropewalk.adapt.peft_load import load_adapter
from ropewalk.adapt.peft_save import read_parameters, save_adapter
from ropewalk.adapt.targets import left_out

__all__ = [
    "AdapterConfig",
    "DoRALinear",
    "LoRALinear",
    "adapter_parameters",
    "apply_adapter",
    "freeze",
    "left_out",
    "load_adapter",
    "merge",
    "quantize_base",
    "rate_factors",
    "read_parameters",
    "save_adapter",
    "unmerged",
]
