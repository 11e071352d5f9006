"""Tiny random models of several families, as transformers has them and as Ropewalk loads them."""

import json
from pathlib import Path

import pytest
import torch

BASE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96},
}


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> dict[str, Path]:
    """A Hugging Face directory of each family, float32, seeded, with weights large enough to be decided."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for name, fields in FAMILIES.items():
        base = {k: v for k, v in BASE.items() if name != "gpt2" or k.endswith(("_id", "range", "vocab_size"))}
        config = AutoConfig.for_model(**base, **fields)
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
        for file in tiny_tokenizer_dir.iterdir():
            shutil.copy(file, path)
        assert json.loads((path / "config.json").read_text())["model_type"] == fields["model_type"]
        found[name] = path
    return found


@pytest.fixture(scope="session")
def models(family_dirs: dict[str, Path]):
    """name -> (transformers' model, Ropewalk's), each loaded once."""
    from transformers import AutoModelForCausalLM

    from ropewalk.model import load_model

    loaded: dict[str, tuple] = {}

    def get(name: str) -> tuple:
        if name not in loaded:
            reference = AutoModelForCausalLM.from_pretrained(family_dirs[name], dtype=torch.float32)
            loaded[name] = (reference.eval(), load_model(family_dirs[name]).eval())
        return loaded[name]

    return get
