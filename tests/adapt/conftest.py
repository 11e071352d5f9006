"""One tiny model of every family, as transformers builds it and as Ropewalk loads it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

BASE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GPT2 = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": BASE | {"head_dim": 6},
    "gemma2": BASE | {"head_dim": 6, "sliding_window": 4},
    "gemma3_text": BASE | {"head_dim": 6, "sliding_window": 4},
    "phi3": BASE,
    "olmo2": BASE,
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": BASE | {"num_key_value_heads": None, "rotary_pct": 0.5},
    "mixtral": BASE | {"num_local_experts": 4},
    "qwen3_moe": BASE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
    | {"mlp_only_layers": [1]},
}


@dataclass(frozen=True)
class Tiny:
    """A family's model in a directory; `theirs()` and `ours()` are fresh copies."""

    family: str
    path: Path

    def theirs(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, attn_implementation="eager").eval()

    def ours(self, dtype: str = "float32") -> Any:
        from ropewalk.model import load_model

        return load_model(self.path, dtype)

    def tokens(self) -> torch.Tensor:
        return torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    @cache
    def make(family: str) -> Tiny:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(3)
        arguments = {key: value for key, value in FAMILIES[family].items() if value is not None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **arguments))
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        return Tiny(family, path)

    return make


@pytest.fixture(params=FAMILIES)
def tiny(request, tiny_model):
    """Once for each family."""
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")
