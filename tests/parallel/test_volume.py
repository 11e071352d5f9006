"""What a step sends is what the closed forms say: so its cost on many machines can be foreseen."""

import json
from pathlib import Path
from typing import Any

import pytest

from ropewalk.parallel.launch import launch

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "tie_word_embeddings": True,
}
MIXTURE = SHAPE | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
ROWS, LENGTH, MICRO = 8, 64, 2
"""A step: 4 micro-batches of 2 rows in one process, 2 of them in each of two."""


def counted(jobs: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """What the first of two processes sends in a step, by job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    assert launch([str(Path(__file__).with_name("volume.py")), str(folder / "jobs.json")], 2) == 0
    found: dict[str, dict[str, Any]] = json.loads((folder / "jobs.result").read_text())
    return found


def recipe_of(make_recipe: Any, shape: dict[str, Any], layout: dict[str, Any], **train: Any) -> Any:
    recipe = make_recipe(batch_size=ROWS, micro_batch_size=MICRO, self_check=False, clip=0.0, **train)
    recipe["model"] = {"config": shape, "tokenizer": recipe["model"]["source"]}
    recipe["parallel"] = layout
    recipe["data"]["sequence_length"] = LENGTH  # rows are cut to a multiple of 64 tokens: all are whole
    return recipe


def test_what_a_step_sends_is_what_the_closed_forms_say(make_recipe, tmp_path):
    """Ring counts (t - 1) / t; P: bytes of the weights, b: of the hidden states of all tokens."""
    layouts = {
        "stage 1": {"shard": 2, "stage": 1},
        "stage 2": {"shard": 2, "stage": 2},
        "stage 3": {"shard": 2, "stage": 3},
        "replicated": {"replicate": 2, "shard": 1},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "interleaved": {"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"},
        "there and back": {"pipeline": 2, "pipeline_schedule": "zbv"},
    }
    jobs = {name: recipe_of(make_recipe, SHAPE, layout) for name, layout in layouts.items()}
    found = counted(jobs, tmp_path)
    weights, half = found["stage 3"]["weights"], 1 / 2  # (t - 1) / t of two processes
    embedding = 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    embeddings = embedding + 4 * SHAPE["hidden_size"]
    blocks = weights - embeddings
    micro = ROWS // 2 // MICRO
    hidden = 4 * ROWS * LENGTH * SHAPE["hidden_size"]
    layers = SHAPE["num_hidden_layers"]
    expected = {
        # gradients once a step, and the updated weights once: 2 P
        "stage 1": {"all-gather": half * weights, "reduce-scatter": half * weights},
        # gradients of each micro-batch
        "stage 2": {"all-gather": half * weights, "reduce-scatter": half * weights * micro},
        # of each micro-batch: weights of the blocks before forward and before backward, of what is outside of
        # them once, and gradients: 3 P
        "stage 3": {
            "all-gather": half * micro * (2 * blocks + embeddings),
            "reduce-scatter": half * weights * micro,
        },
        "replicated": {"all-reduce": 2 * half * weights * micro},
        # each block: two gatherings and two scatterings forward, as many backward; once more at both ends
        "tensor": {
            "all-gather": half * hidden * (4 * layers + 1 + 1),
            "reduce-scatter": half * hidden * (4 * layers + 1),
        },
        # of all processes together: hidden states forward and their gradients backward, between one stage and
        # the next in another process; and both ends tell each other the gradient of the embedding
        "pipeline": {"sent": 2 * hidden + 2 * embedding},
        "interleaved": {"sent": 2 * hidden * 3 + 2 * embedding},
        "there and back": {"sent": 2 * hidden * 2},  # the second and the third stage are in one process
    }
    for name, kinds in expected.items():
        for kind, size in kinds.items():
            assert found[name][kind] == pytest.approx(size, rel=0.01), (name, kind)


def test_experts_get_each_row_once_there_and_back_in_each_direction(make_recipe, tmp_path):
    """Exact: there and back, forward and backward (and forward once more where it is recomputed), one row for
    each of the top_k experts of each token, of both processes. How many of them have their experts in the
    other process is for the routers to say: that is counted there, and as exact; with these it is near half.
    """
    passes = {"kept": {}, "recomputed": {"checkpointing": "full"}}
    layout = {"shard": 2, "expert": 2}
    jobs = {name: recipe_of(make_recipe, MIXTURE, layout, **train) for name, train in passes.items()}
    found = counted(jobs, tmp_path)
    row = 4 * MIXTURE["hidden_size"]
    choices = ROWS * LENGTH * MIXTURE["num_experts_per_tok"] * MIXTURE["num_hidden_layers"]
    for name, forward in (("kept", 1), ("recomputed", 2)):
        rows, sent, chosen, elsewhere = found[name]["everywhere"]
        assert chosen == forward * choices  # routers are asked again, too
        assert rows == 2 * (forward + 1) * choices * row
        assert sent == 2 * (forward + 1) * elsewhere / forward * row
        assert 0.35 < elsewhere / chosen < 0.65
