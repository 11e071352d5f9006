"""The recipes that come with Ropewalk load, and run on tiny models with the rest as they have it."""

import json
from pathlib import Path

import pytest

from ropewalk.recipe import load_recipe, resolve
from ropewalk.recipe.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GPU = Machine(cores=8, cpu_bfloat16=True, gpu=True, gpu_bfloat16=True)


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [
        {"prompt": f"What is {i} plus {i}? Say it in words.", "completion": f"It is {2 * i}, of course."}
        for i in range(40)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"The rope number {i} was laid in parallel strands. " * (i % 7 + 1))
    return folder


def tiny(tmp_path: Path, *more: str) -> list[str]:
    """Overrides that make any recipe small; the rest stays as the recipe has it."""
    return [
        f"runs={tmp_path / 'runs'}",
        f"data.directory={tmp_path / 'prepared'}",
        "data.sequence_length=64",
        "data.validation_fraction=0.2",
        "train.steps=2",
        "train.batch_size=2",
        "train.micro_batch_size=1",
        "train.device=cpu",
        "train.evaluate_rows=2",
        "evaluate.max_new_tokens=3",
        *more,
    ]


def trained(recipe: str, overrides: list[str]):
    from ropewalk.train import train

    result = train(load_recipe(ROOT / "recipes" / recipe, overrides), progress=False)
    assert result.step == 2
    assert all(0 < loss < 20 for loss in result.losses)
    return result


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_resolves_and_names_its_schema(path):
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for machine in (Machine(cores=2, cpu_bfloat16=True), GPU):
        resolve(recipe, machine=machine)


def test_there_are_the_promised_recipes():
    assert {path.stem for path in RECIPES} >= {
        "quickstart",
        "pretrain-small",
        "finetune-full",
        "finetune-lora-8b",
        "finetune-qlora",
    }


def test_the_small_model_has_10_to_30_million_parameters():
    import torch

    from ropewalk.model import Transformer, config_from_hf

    config = load_recipe(ROOT / "recipes" / "pretrain-small.yaml").model.config
    with torch.device("meta"):
        model = Transformer(config_from_hf(config))
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 30e6


def test_the_8b_recipe_steps_over_131072_tokens():
    train = resolve(load_recipe(ROOT / "recipes" / "finetune-lora-8b.yaml"), machine=GPU).recipe.train
    assert (train.batch_size, train.micro_batch_size) == (32, 4)
    assert (train.device, train.precision, train.checkpointing) == ("cuda", "bfloat16", "full")


def test_lora_8b_on_a_tiny_model(tmp_path, data, tiny_llama_dir):
    overrides = tiny(tmp_path, f"model.source={tiny_llama_dir}", f"data.train.0.path={data}")
    result = trained("finetune-lora-8b.yaml", overrides)
    adapter = json.loads((result.checkpoint / "model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 64)


def test_qlora_on_a_tiny_model(tmp_path, data, tiny_llama_dir):
    overrides = tiny(tmp_path, f"model.source={tiny_llama_dir}", f"data.train.0.path={data}")
    result = trained("finetune-qlora.yaml", overrides)
    assert (result.checkpoint / "model" / "adapter_model.safetensors").is_file()
    assert load_recipe(result.run / "recipe.yaml").adapt.quantize == "nf4"


def test_finetune_full_on_a_tiny_model(tmp_path, data, tiny_llama_dir):
    overrides = tiny(tmp_path, f"model.source={tiny_llama_dir}", f"data.train.0.path={data}")
    result = trained("finetune-full.yaml", overrides)
    assert (result.checkpoint / "model" / "model.safetensors").is_file()


def test_pretrain_small_on_a_tiny_shape(tmp_path, texts, tiny_tokenizer_dir):
    result = trained(
        "pretrain-small.yaml",
        tiny(
            tmp_path,
            f"model.tokenizer={tiny_tokenizer_dir}",
            "model.config.vocab_size=384",
            "model.config.hidden_size=24",
            "model.config.intermediate_size=32",
            "model.config.num_hidden_layers=2",
            f"data.train.0.path={texts}",
        ),
    )
    assert result.validation_before is not None


def test_the_whole_lane_on_a_tiny_model(tmp_path, data, tiny_llama_dir, capsys):
    """`ropewalk run`: stages, comparison, report, and where to go from there."""
    from ropewalk.cli import main

    task = f"{{name: sums, path: {data}, limit: 6, max_new_tokens: 4}}"
    few = f"{{name: few-shot, path: {data}, limit: 6, max_new_tokens: 4, shots: 1, shots_path: {data}}}"
    overrides = tiny(
        tmp_path,
        f"model.source={tiny_llama_dir}",
        "data.validation=[]",
        f"data.train.0.path={data}",
        f"evaluate.tasks=[{task}]",
        f"evaluate.base=[{task}, {few}]",
    )
    assert main(["run", str(ROOT / "recipes" / "quickstart.yaml"), *overrides]) == 0
    out, err = capsys.readouterr()
    for heading in (
        "1/4 prepare",
        "2/4 evaluate the base model",
        "3/4 train",
        "4/4 evaluate the tuned model",
    ):
        assert f"== {heading}" in err
    assert "chrf" in out
    assert "talk to it   ropewalk chat" in out
    (run,) = (tmp_path / "runs").iterdir()
    report = (run / "report.md").read_text()
    assert "## Base against tuned" in report
    assert report.count("- tuned: ") == 5
    for name in ("base", "tuned"):
        assert (run / f"evaluation-{name}.json").is_file()

    assert main(["runs", "ls", str(tmp_path / "runs"), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["status"], listed["step"]) == ("finished", 2)


def test_a_missing_evaluation_file_is_said_before_the_work(tmp_path, data, capsys):
    from ropewalk.cli import main

    overrides = tiny(tmp_path, f"data.train.0.path={data}", "data.validation=[]")
    assert (
        main(["run", str(ROOT / "recipes" / "quickstart.yaml"), *overrides, "evaluate.tasks.0.path=no.jsonl"])
        == 2
    )
    assert "no.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "prepared").exists()
