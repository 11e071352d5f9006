"""Tiny models of every family in odd shapes, as transformers builds them and as Ropewalk loads them.

A test that asks for `case` runs once for each of them. To cover a new family, add its cases to CASES.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

GROUPED = {  # three queries to a key, head_dim not hidden / heads where the family allows it
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SINGLE = GROUPED | {  # one key head for all queries, prime sizes
    "vocab_size": 53,
    "hidden_size": 30,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
EVEN = GROUPED | {  # every head its own key, wide heads
    "vocab_size": 41,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
NO_GROUPS = {"num_key_value_heads": None}
GPT2 = {"vocab_size": 37, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
BIASES = {"attention_bias": True}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """transformers' rope_parameters, with a base that differs from every default."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **parameters}}


def long_factors(pairs: int) -> dict[str, Any]:
    short = [1.0 + 0.1 * i for i in range(pairs)]
    return {"short_factor": short, "long_factor": [2.0 + 0.5 * i for i in range(pairs)]}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 2, "truncate": False}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("llama", GROUPED | {"head_dim": 10}),
    "llama-tied": ("llama", SINGLE | BIASES | {"mlp_bias": True, "hidden_act": "gelu"}),
    "llama-wide": ("llama", EVEN | {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "llama-linear": ("llama", GROUPED | rope("linear", factor=3.0)),
    "llama-dynamic": (
        "llama",
        GROUPED | {"max_position_embeddings": 8, "head_dim": 8} | rope("dynamic", factor=3.0),
    ),
    "llama-llama3": ("llama", GROUPED | {"head_dim": 10} | rope("llama3", **LLAMA3)),
    "llama-yarn": ("llama", GROUPED | {"head_dim": 16} | rope("yarn", **YARN)),
    "llama-yarn-mscale": ("llama", GROUPED | {"head_dim": 16} | rope("yarn", **MSCALE)),
    "llama-longrope": (
        "llama",
        GROUPED | rope("longrope", original_max_position_embeddings=32, factor=2.0, **long_factors(2)),
    ),
    "mistral-window": ("mistral", GROUPED | {"head_dim": 10, "sliding_window": 5}),
    "mistral-full": ("mistral", SINGLE | {"sliding_window": None}),
    "mistral-wide": ("mistral", EVEN | {"head_dim": 6, "sliding_window": 1}),
    "qwen2-grouped": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", SINGLE | rope("yarn", **YARN)),
    "qwen3-grouped": ("qwen3", GROUPED | {"head_dim": 10}),
    "qwen3-window": (
        "qwen3",
        GROUPED | MIXED | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3-tied": ("qwen3", SINGLE | BIASES | {"head_dim": 14}),
    "gemma2-grouped": ("gemma2", GROUPED | {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma2-pattern": (
        "gemma2",
        GROUPED
        | MIXED
        | {"head_dim": 6, "sliding_window": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "gemma2",
        EVEN | BIASES | {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3-grouped": (
        "gemma3_text",
        GROUPED | {"head_dim": 10, "sliding_window": 5, "sliding_window_pattern": 2},
    ),
    "gemma3-linear": (
        "gemma3_text",
        GROUPED
        | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            }
        },
    ),
    "gemma3-untied": (
        "gemma3_text",
        EVEN | {"head_dim": 6, "sliding_window": 30, "final_logit_softcapping": 5.0},
    ),
    "phi3-grouped": ("phi3", GROUPED),
    "phi3-partial": ("phi3", SINGLE | {"sliding_window": 6} | rope("default", partial_rotary_factor=0.67)),
    "phi3-longrope-short": (
        "phi3",
        EVEN | {"original_max_position_embeddings": 32} | rope("longrope", **long_factors(2)),
    ),
    "phi3-longrope-long": (
        "phi3",
        EVEN | {"original_max_position_embeddings": 8} | rope("longrope", **long_factors(2)),
    ),
    "olmo2-grouped": ("olmo2", GROUPED | {"head_dim": 10}),
    "olmo2-tied": ("olmo2", SINGLE | BIASES),
    "olmo2-even": ("olmo2", EVEN | rope("linear", factor=2.0)),
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner": ("gpt2", GPT2 | {"n_inner": 17, "n_embd": 20, "n_head": 5, "vocab_size": 53}),
    "gpt2-untied": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "n_head": 1},
    ),
    "gpt_neox": ("gpt_neox", GROUPED | NO_GROUPS),
    "gpt_neox-sequential": (
        "gpt_neox",
        EVEN
        | NO_GROUPS
        | {"use_parallel_residual": False, "attention_bias": False, "hidden_size": 48}
        | rope("default", partial_rotary_factor=0.5),
    ),
    "gpt_neox-odd": (  # a quarter of 12 is 3 elements: two pairs
        "gpt_neox",
        SINGLE | NO_GROUPS | {"hidden_size": 60} | rope("default", partial_rotary_factor=0.25),
    ),
    "mixtral-grouped": ("mixtral", GROUPED | {"num_local_experts": 5, "head_dim": 8}),
    "mixtral-window": (
        "mixtral",
        SINGLE | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 4},
    ),
    "mixtral-even": ("mixtral", EVEN | {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe-grouped": (
        "qwen3_moe",
        GROUPED | {"num_experts": 5, "num_experts_per_tok": 2, "head_dim": 10},
    ),
    "qwen3_moe-sparse": (
        "qwen3_moe",
        GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [2]}
        | {"decoder_sparse_step": 1, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3_moe-tied": (
        "qwen3_moe",
        SINGLE | {"num_experts": 3, "num_experts_per_tok": 1, "decoder_sparse_step": 2},
    ),
}


@dataclass(frozen=True)
class Pair:
    """One model twice, and the directory through which it went."""

    name: str
    theirs: nn.Module
    ours: Any
    path: Path

    @property
    def length(self) -> int:
        """Tokens that every case takes."""
        return 21

    def tokens(self, batch: int = 2, length: int | None = None, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, length or self.length)
        return torch.randint(3, self.ours.config.vocab_size, shape, generator=generator)


def build_theirs(name: str, seed: int = 0) -> nn.Module:
    """The transformers model with random norms and biases too, and weights that give logits well above 1."""
    import transformers

    transformers.logging.set_verbosity_error()
    model_type, fields = CASES[name]
    fields = json.loads(
        json.dumps({k: v for k, v in fields.items() if v is not None or k.endswith("window")})
    )
    if model_type == "gemma2":
        fields |= {k: v for k, v in CASES[name][1].items() if k.endswith("capping")}
    if model_type == "gpt_neox":
        fields.pop("num_key_value_heads", None)
    if model_type == "qwen3_moe":
        fields["moe_intermediate_size"] = 7
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            of_norm = "norm" in parameter_name or ".ln_" in parameter_name
            center = 1.0 if of_norm and parameter_name.endswith("weight") else 0.0
            if of_norm and "gemma" in model_type:
                center = 0.2  # it multiplies by 1 + weight
            parameter.normal_(center, 0.25, generator=generator)
    return model


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """`make_pair(name)`: the case in both forms, made once."""

    @cache
    def make(name: str) -> Pair:
        from ropewalk.model import load_model

        theirs = build_theirs(name)
        path = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(path)
        return Pair(name, theirs, load_model(path), path)

    return make


@pytest.fixture(scope="session")
def case_names() -> list[str]:
    return sorted(CASES)


@pytest.fixture
def pair(case: str, make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair(case)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and not any(
        "case" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("case", sorted(CASES))
