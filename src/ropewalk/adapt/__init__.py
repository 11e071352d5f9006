"""The adapt room: what makes a model cheap to train.

In: a Transformer, or an adapter directory. Out: the same Transformer with adapters in it, or merged.
May import ropewalk.model, ropewalk.ops, ropewalk.files and ropewalk.errors.
"""

from ropewalk.adapt.lora import LoraConfig, LoRALinear, apply_lora, lora_parameters, merge, unmerged
from ropewalk.adapt.peft_load import load_adapter
from ropewalk.adapt.peft_save import save_adapter
from ropewalk.adapt.targets import left_out

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "apply_lora",
    "left_out",
    "load_adapter",
    "lora_parameters",
    "merge",
    "save_adapter",
    "unmerged",
]
