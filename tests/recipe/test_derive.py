"""What a recipe leaves open is filled in, each value with its reason."""

import json
from pathlib import Path

import pytest

from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.recipe import Machine, json_schema, load_recipe, load_with_origins, resolve, to_yaml
from ropewalk.recipe.derive import leaves
from ropewalk.recipe.machine import _cpu_has_bfloat16, _gpu_capability, _torch_has_cuda

ROOT = Path(__file__).resolve().parents[2]
OLD = Machine(cores=4, cpu_bfloat16=False)
NEW = Machine(cores=4, cpu_bfloat16=True)
GPU = Machine(cores=4, cpu_bfloat16=False, gpu=True, gpu_bfloat16=True)
OLD_GPU = Machine(cores=4, cpu_bfloat16=True, gpu=True, gpu_bfloat16=False)
BASE = {
    "name": "x",
    "model": {"source": "folder"},
    "data": {"train": [{"path": "texts/a.jsonl"}]},
    "train": {"steps": 100},
}


def resolved(*overrides: str, machine: Machine = OLD):
    return resolve(load_recipe(BASE, overrides), machine=machine)


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["adapt.method=lora"], 2e-4),
        ([], 2e-5),
        (["model.config=shape.yaml", "model.tokenizer=t"], 6e-4),
        (["adapt.method=lora", "train.optimizer.learning_rate=3"], 3.0),
    ],
)
def test_learning_rate_by_method(overrides, rate):
    assert resolved(*overrides).recipe.train.optimizer.learning_rate == rate


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (OLD, [], ("cpu", "float32")),
        (NEW, [], ("cpu", "bfloat16")),
        (GPU, [], ("cuda", "bfloat16")),
        (OLD_GPU, [], ("cuda", "float32")),
        (GPU, ["train.device=cpu"], ("cpu", "float32")),
        (NEW, ["train.precision=float32"], ("cpu", "float32")),
    ],
)
def test_device_and_precision(machine, overrides, expected):
    train = resolved(*overrides, machine=machine).recipe.train
    assert (train.device, train.precision) == expected


@pytest.mark.parametrize(
    ("overrides", "machine", "expected"),
    [
        ([], OLD, (8, 2)),
        ([], GPU, (8, 8)),
        (["data.sequence_length=512"], OLD, (8, 4)),
        (["train.batch_size=6", "data.sequence_length=512"], OLD, (6, 3)),
        (["train.batch_size=7"], OLD, (7, 1)),
        (["data.sequence_length=100000"], GPU, (8, 1)),
        (["train.batch_tokens=16384"], GPU, (16, 8)),
        (["train.batch_tokens=3"], OLD, (1, 1)),
        (["train.batch_size=6", "train.micro_batch_size=2"], OLD, (6, 2)),
    ],
)
def test_batch_and_micro_batch(overrides, machine, expected):
    train = resolved(*overrides, machine=machine).recipe.train
    assert (train.batch_size, train.micro_batch_size) == expected
    assert train.batch_size % train.micro_batch_size == 0


def test_a_micro_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"train\.micro_batch_size: 4 does not divide the batch of 6 rows"):
        resolved("train.batch_size=6", "train.micro_batch_size=4")


def test_warmup_follows_the_length_where_it_is_known():
    assert resolved().recipe.train.schedule.warmup_steps == 3
    by_tokens = resolved("train.tokens=819201", "train.schedule.warmup_fraction=0.5")  # 100 steps and a bit
    assert by_tokens.recipe.train.schedule.warmup_steps == 50
    by_epochs = resolved("train.epochs=2")
    assert by_epochs.recipe.train.schedule.warmup_steps is None
    assert "epochs" in by_epochs.origins["train.schedule.warmup_steps"].why


def test_the_rest():
    recipe = resolved("adapt.method=lora", "adapt.rank=4", "data.sequence_length=300").recipe
    assert recipe.model.tokenizer == "folder"
    assert recipe.data.train[0].name == "a.jsonl"
    assert recipe.adapt.alpha == 8.0
    assert (recipe.evaluate.window, recipe.evaluate.stride) == (300, 150)
    assert (recipe.train.threads, recipe.data.workers) == (4, 4)


@pytest.mark.parametrize(
    "overrides", [[], ["train.epochs=2"], ["train.batch_tokens=9000", "adapt.method=lora"]]
)
def test_a_resolved_recipe_is_resolved_and_reloads_equal(tmp_path, overrides):
    """runs/NAME/recipe.yaml is one: what it says does not depend on the machine that reads it."""
    once = resolved(*overrides, machine=NEW).recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(once))
    assert load_recipe(path) == once
    assert resolve(load_recipe(path), machine=GPU).recipe == once


def test_every_leaf_says_where_it_comes_from(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(BASE))
    found = resolve(*load_with_origins(path, ["train.batch_size=4"]), machine=OLD)
    assert list(found.origins) == [name for name, _ in leaves(found.recipe)]
    kinds = {name: origin.kind for name, origin in found.origins.items()}
    assert kinds["train.steps"] == "file"
    assert kinds["train.batch_size"] == "override"
    assert kinds["train.clip"] == "default"
    assert kinds["train.micro_batch_size"] == "derived"
    assert all(origin.why for origin in found.origins.values() if origin.kind == "derived")


def test_processors_with_bfloat16(tmp_path):
    for text, expected in (
        ("processor : 0\nflags\t\t: fpu sse2 avx512_bf16 amx_tile\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags : fpu avx2\n", False),
        ("", False),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        assert _cpu_has_bfloat16(tmp_path / "cpuinfo") is expected
    assert not _cpu_has_bfloat16(tmp_path / "missing")


def test_the_schema_file_is_current_and_complete():
    """After a change of the schema: ropewalk recipe schema --out recipes/schema.json"""
    text = (ROOT / "recipes" / "schema.json").read_text()
    assert json.loads(text) == json_schema()


def test_every_field_has_a_line_of_documentation():
    schema = json_schema()
    undocumented = [
        f"{name}.{field}"
        for name, section in {**schema["$defs"], "Recipe": schema}.items()
        for field, value in section["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert undocumented == []


def test_editors_are_told_the_bounds_of_numbers():
    sections = json_schema()["$defs"]
    assert sections["Adapt"]["properties"]["rank"]["exclusiveMinimum"] == 0
    dropout = sections["Adapt"]["properties"]["dropout"]
    assert (dropout["minimum"], dropout["exclusiveMaximum"]) == (0, 1)
    assert json_schema()["properties"]["seed"]["minimum"] == 0


def test_a_recipe_has_a_bounded_number_of_fields():
    from ropewalk.recipe.fields import all_fields

    assert len(all_fields()) <= 152


@pytest.mark.parametrize(
    ("overrides", "processes", "local", "expected"),
    [
        ([], None, None, 4),
        (["parallel.shard=2"], None, None, 2),  # Ropewalk starts both itself, here
        (["parallel.shard=8"], None, None, 1),
        ([], 8, 2, 2),  # torchrun: two of the eight are on this machine
        ([], 8, None, 4),  # a scheduler that gives each process its own cores
        (["train.threads=3"], 8, 2, 3),
    ],
)
def test_processes_of_a_machine_share_its_cores(overrides, processes, local, expected):
    machine = Machine(cores=4, cpu_bfloat16=False, processes=processes, local_processes=local)
    assert resolved(*overrides, machine=machine).recipe.train.threads == expected


@pytest.mark.parametrize(
    ("said", "visible", "expected"),
    [
        ("9.0\n8.6", None, 8.6),  # the weakest decides
        ("7.5", None, 7.5),
        ("No devices were found", None, None),
        ("9.0", "", None),
        ("9.0", "-1", None),
        ("9.0", "0", 9.0),
    ],
)
def test_gpus_are_found_without_torch(tmp_path, monkeypatch, said, visible, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpu_capability() == expected


def test_what_is_said_of_this_machine_is_what_torch_says():
    import torch

    assert _torch_has_cuda() == (torch.version.cuda is not None)
    assert Machine.here().gpu == torch.cuda.is_available()


def test_an_automatic_layout_is_pure_sharding():
    """Until there is a planner that proposes one."""
    machine = Machine(cores=8, cpu_bfloat16=True, processes=4)
    found = resolve(load_recipe({**BASE, "parallel": "auto"}), machine=machine).recipe.parallel
    assert (found.replicate, found.shard, found.context, found.tensor, found.stage) == (1, 4, 1, 1, 3)
    with pytest.raises(UserError, match="parallel"):
        load_recipe({**BASE, "parallel": "automatic"})


def test_a_pipeline_gets_the_rest_of_the_processes_and_micro_batches_enough():
    machine = Machine(cores=8, cpu_bfloat16=True, processes=4)
    words = ["parallel.pipeline=-1", "parallel.shard=1", "data.sequence_length=64"]
    found = resolve(load_recipe(BASE, [*words, "train.batch_size=32"]), machine=machine)
    assert found.recipe.parallel.pipeline == 4
    assert found.recipe.train.micro_batch_size == 2  # 16 micro-batches: four for each process
    few = resolve(load_recipe(BASE, [*words, "train.batch_size=6"]), machine=machine).recipe.train
    assert few.micro_batch_size == 1  # 1f1b wants 4 at least
    interleaved = [*words, "parallel.pipeline_schedule=interleaved-1f1b", "train.batch_size=10"]
    assert resolve(load_recipe(BASE, interleaved), machine=machine).recipe.train.micro_batch_size == 1
    with pytest.raises(UserError, match="pipeline and shard are both -1"):
        resolve(load_recipe(BASE, ["parallel.pipeline=-1"]), machine=machine)


@pytest.mark.parametrize("said", ["", "two", "-3", "0"])
def test_a_number_of_processes_that_is_none_is_named(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(UserError, match=f"the environment variable WORLD_SIZE is '{said}'"):
        Machine.here.__wrapped__()


@pytest.mark.parametrize("degree", ["shard", "expert"])
def test_a_degree_of_none_is_named(degree):
    with pytest.raises(UserError, match=f"parallel.{degree} is 0; it must be at least 1, or -1"):
        Layout(**{"shard": 4, degree: 0}).over(4)
