"""What a step sends is what the closed forms say: so its cost on many machines can be foreseen."""

import json
from pathlib import Path
from typing import Any

import pytest

from ropewalk.parallel.launch import launch
from ropewalk.plan.traffic import traffic
from ropewalk.plan.work import work_of
from ropewalk.recipe import load_recipe, resolve
from ropewalk.train.build import config_of

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


def counted(jobs: dict[str, Any], folder: Path, processes: int = 2) -> dict[str, dict[str, Any]]:
    """What each of the processes sends in a step, on average, by job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    assert launch([str(Path(__file__).with_name("volume.py")), str(folder / "jobs.json")], processes) == 0
    found: dict[str, dict[str, Any]] = json.loads((folder / "jobs.result").read_text())
    return found


def recipe_of(make_recipe: Any, shape: dict[str, Any], layout: dict[str, Any], **train: Any) -> Any:
    adapt = {name: train.pop(name) for name in ("method", "quantize") if name in train}
    usual = {"batch_size": ROWS, "micro_batch_size": MICRO, "self_check": False, "clip": 0.0}
    recipe = make_recipe(**usual | train)
    if adapt:  # of a pretrained model
        recipe["adapt"] = adapt
    else:
        recipe["model"] = {"config": shape, "tokenizer": recipe["model"]["source"]}
    recipe["parallel"] = layout
    recipe["data"]["sequence_length"] = LENGTH  # rows are cut to a multiple of 64 tokens: all are whole
    return recipe


def test_what_a_step_sends_is_what_the_closed_forms_say(make_recipe, tmp_path):
    """Stage 1: 2 P, stage 2 with gradients of each micro-batch, stage 3: 3 P for each of them; four exchanges
    in each block of shared products, and two more for its backward pass; keys and values of whole rows twice,
    and their gradients once; hidden states and gradients from stage to stage: `plan.traffic`. Nothing else
    is sent."""
    full, selective = {"checkpointing": "full"}, {"checkpointing": "selective"}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "stage 1": ({"shard": 2, "stage": 1}, {}),
        "stage 2": ({"shard": 2, "stage": 2}, {}),
        "stage 3": ({"shard": 2, "stage": 3}, {}),
        "LoRA": ({"shard": 2}, {"method": "lora"}),
        "QLoRA": ({"shard": 2}, {"method": "lora", "quantize": "nf4"}),
        "replicated": ({"replicate": 2, "shard": 1}, {}),
        "replicated LoRA": ({"replicate": 2, "shard": 1}, {"method": "lora"}),
        "tensor LoRA": ({"tensor": 2}, {"method": "lora"}),
        "tensor": ({"tensor": 2}, {}),
        "tensor, recomputed": ({"tensor": 2}, full),
        "tensor, every second recomputed": ({"tensor": 2}, full | {"checkpointing_every": 2}),
        "tensor, selective": ({"tensor": 2}, selective),
        "context": ({"context": 2, "shard": 1}, {}),
        "context, recomputed": ({"context": 2, "shard": 1}, full),
        "context, selective": ({"context": 2, "shard": 1}, selective),
        "ring": ({"context": 2, "shard": 1, "context_exchange": "ring"}, {}),
        "ring, recomputed": ({"context": 2, "shard": 1, "context_exchange": "ring"}, full),
        "ulysses": ({"context": 2, "shard": 1, "context_exchange": "ulysses"}, {}),
        "ulysses, recomputed": ({"context": 2, "shard": 1, "context_exchange": "ulysses"}, full),
        "ulysses, selective": ({"context": 2, "shard": 1, "context_exchange": "ulysses"}, selective),
        "pipeline": ({"pipeline": 2}, {}),
        "interleaved": ({"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"}, {}),
        "there and back": ({"pipeline": 2, "pipeline_schedule": "zbv"}, {}),
    }
    compared(cases, make_recipe, tmp_path)


@pytest.mark.slow
def test_four_processes_in_two_ways_at_once_send_what_the_closed_forms_say(make_recipe, tmp_path):
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "tensor, sharded": ({"tensor": 2, "shard": 2}, {}),
        "tensor, context": ({"tensor": 2, "context": 2, "shard": 1}, {"checkpointing": "full"}),
        "tensor, pipeline": ({"tensor": 2, "pipeline": 2}, {}),
        "tensor, zbv": ({"tensor": 2, "pipeline": 2, "pipeline_schedule": "zbv"}, {}),
        "pipeline, sharded": ({"pipeline": 2, "shard": 2, "stage": 2}, {"batch_size": 16}),
        "pipeline, context": ({"pipeline": 2, "context": 2, "shard": 1}, {}),
        "replicated, sharded": ({"replicate": 2, "shard": 2}, {}),
    }
    compared(cases, make_recipe, tmp_path, processes=4)


def compared(cases: Any, make_recipe: Any, folder: Path, processes: int = 2) -> None:
    jobs = {name: recipe_of(make_recipe, SHAPE, layout, **train) for name, (layout, train) in cases.items()}
    found = counted(jobs, folder, processes)
    for name in cases:
        recipe = resolve(load_recipe(jobs[name])).recipe
        work = work_of(recipe, config_of(recipe), processes)
        assert work.layout.processes == processes, name
        sent, expected = found[name], traffic(work)
        if "ring" in expected:
            sent["ring"] = sent.pop("sent")
        assert expected, name
        for kind in sorted({*expected, *sent}):
            assert sent.get(kind, 0) == pytest.approx(expected.get(kind, 0), rel=0.01), (name, kind)


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
