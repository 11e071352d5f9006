"""The model room. In: Hugging Face and GGUF files. Out: the Transformer, its tokenizer and cache.

May import ropewalk.ops, ropewalk.files and ropewalk.errors, and ropewalk.adapt to load what it trained.
"""

from ropewalk.model.cache import KVCache
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_config import config_from_hf
from ropewalk.model.families_weights import WeightRule, weight_map
from ropewalk.model.families_write import config_to_hf
from ropewalk.model.init import config_from_fields, from_config
from ropewalk.model.load import load_model, read_config
from ropewalk.model.save import save_model
from ropewalk.model.source import resolve_source
from ropewalk.model.tokenizer import load_tokenizer
from ropewalk.model.transformer import Transformer

__all__ = [
    "KVCache",
    "ModelConfig",
    "Transformer",
    "WeightRule",
    "config_from_fields",
    "config_from_hf",
    "config_to_hf",
    "from_config",
    "load_model",
    "load_tokenizer",
    "read_config",
    "resolve_source",
    "save_model",
    "weight_map",
]
