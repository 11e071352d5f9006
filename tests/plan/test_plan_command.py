"""`ropewalk plan`: what a user reads, what a script reads, and what a run makes of its own plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.plan import accuracy, outcomes
from ropewalk.plan.calibration import Calibration, Rates, calibration
from ropewalk.plan.entry import as_overrides
from ropewalk.plan.hardware import cpu_kind
from ropewalk.plan.here import here
from ropewalk.recipe import Machine, load_recipe, resolve
from ropewalk.track import RunDirectory
from ropewalk.train.entry import layout_of, planned

LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def recipe_file(make_recipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(batch_size=8, micro_batch_size=1, steps=4)))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_plan_for_people(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here, and on a cluster: whether it fits, how long it takes, where memory and time go, which layouts
    are best."""
    here = said(capsys, recipe_file)
    assert "this machine" in here
    assert "fits     yes" in here
    assert "4 steps in" in here
    assert "doctor --calibrate" in here  # a table's rates are not this processor's
    there = said(capsys, recipe_file, "train.precision=bfloat16", "--on", "8xH100")
    assert "8xH100" in there
    assert "best layouts for the same step:" in there
    assert "$" in there
    assert "doctor --calibrate" not in there


def test_a_plan_for_scripts(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(said(capsys, recipe_file, "--on", "4xA100", "--json"))
    assert plan["run"]["devices"] == 4
    assert plan["seconds"] == pytest.approx(4 * plan["run"]["step_seconds"])
    assert sum(plan["run"]["phases"].values()) == pytest.approx(plan["run"]["step_seconds"])
    assert plan["run"]["memory"]["total_bytes"] <= sum(plan["run"]["memory"]["terms"].values())
    assert plan == json.loads(json.dumps(rw.plan.as_json(rw.plan(recipe_file, on="4xA100"))))
    assert json.loads(said(capsys, recipe_file, "--on", "4xA100", "--by", "cost", "--json"))["ranked"]


def test_a_small_model_waits_for_the_host(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU is faster than what sends it one operation after the other; compiled blocks are not looked at."""
    waits, blocks = "waiting for the host", 2
    auto = ["train.device=auto"]
    small = rw.plan(recipe_file, auto, on="1xH100").run
    assert small.work.config.num_hidden_layers == blocks
    assert small.step_seconds > 0.9 * small.work.accumulation * blocks * 2 * 0.5e-3
    assert small.time.phases[waits] > 0.5 * small.step_seconds
    assert "train.compile: true, are faster" in said(capsys, recipe_file, *auto, "--on", "1xH100")
    assert waits not in rw.plan(recipe_file, [*auto, "train.compile=true"], on="1xH100").run.time.phases
    assert waits not in rw.plan(recipe_file, auto, on="4xCPU-AMX").run.time.phases
    big = {"config": LARGE, "tokenizer": load_recipe(recipe_file).model.source}
    values = {"data.sequence_length": 4096, "model": big, "adapt.method": "full"}
    changed = auto + [f"{name}={json.dumps(value)}" for name, value in values.items()]
    assert waits not in rw.plan(recipe_file, changed, on="8xH100").run.time.phases


def test_what_changes_the_result_is_searched_where_it_is_asked_for(recipe_file: Path) -> None:
    """Never otherwise; and the overrides that are printed are the run that was meant."""
    kinds = {(one.work.precision, one.work.method) for one in rw.plan(recipe_file, on="4xH100").ranked}
    assert len(kinds) == 1
    on = "1xH100"
    ranked = rw.plan(recipe_file, on=on, vary=("precision", "adaptation")).ranked
    assert len({(one.work.precision, one.work.method, one.work.quantize) for one in ranked}) == 5
    assert [one.step_seconds for one in ranked] == sorted(one.step_seconds for one in ranked)
    for one in ranked:
        assert rw.plan(recipe_file, as_overrides(one.work), on).run.step_seconds == one.step_seconds


def test_what_does_not_fit_says_by_how_much_and_what_would_help(
    make_recipe: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    source = str(make_recipe()["model"]["source"])
    recipe = make_recipe(
        model={"config": config, "tokenizer": source},
        data={"sequence_length": 4096},
        precision="bfloat16",
        device="auto",
        micro_batch_size=4,
    )
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(recipe))
    text = said(capsys, path, "--on", "1xA100-40GB-SXM")
    assert "fits     NO" in text
    assert "short " in text
    assert ": it fits" in text  # adapters on a quantized base, at the least


def test_the_real_step_traced(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted and traced side by side, the peak within 5%."""
    source = str(make_recipe()["model"]["source"])
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    path = Path(make_recipe()["runs"]).parent / "traced.yaml"
    path.write_text(yaml.safe_dump(make_recipe(model={"config": config, "tokenizer": source})))
    traced = json.loads(said(capsys, path, "--trace", "--json"))["traced"]
    name, counted, found = traced[-1]
    assert name == "peak"
    assert counted == pytest.approx(found, rel=0.05)
    assert "term by term" in said(capsys, path, "--trace")


def test_auto_takes_what_the_planner_proposes(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two processes a layout of two that the recipe can be trained in; all processes find the same."""
    recipe = load_recipe(make_recipe() | {"parallel": "auto"})
    assert planned(recipe) is recipe
    two = replace(Machine.here(), processes=2)
    monkeypatch.setattr(Machine, "here", lambda: two)
    found = planned(recipe)
    layout = layout_of(resolve(found).recipe)
    assert layout.processes == 2
    assert found == planned(recipe)
    assert planned(load_recipe(make_recipe())).parallel == load_recipe(make_recipe()).parallel


def test_two_plots(recipe_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, head in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")):
        said(capsys, recipe_file, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RECIPE", "--on", "8xH101"], "did you mean H100"),
        (["RECIPE", "--on", "3xH100"], "choose a multiple of 3"),
        (["RECIPE", "--by", "speed"], "--by speed"),
        (["RECIPE", "--vary", "speed"], "--vary speed"),
        (["RECIPE", "--plot", "plan.pdf"], "a plot is a .png or .svg"),
        (["RECIPE", "train.step=3"], "did you mean train.steps"),
        (["nothing.yaml"], "nothing.yaml"),
        ([], "give a recipe"),
        (["budget"], "give one of"),
        (["budget", "--flops", "1e21", "--data", "0"], "data is 0"),
        (["budget", "--days", "3"], "need --on"),
        (["budget", "--flops", "1e21", "--parameters", "0"], "--parameters is 0; it must be above 0"),
        (["failures", "--devices", "9", "--days", "1", "--mtbf-hours", "0"], "--mtbf-hours is 0; it must be"),
        (["failures", "--devices", "8", "--days", "3", "--what-if", "restart"], "restart=290"),
        (["--accuracy", "."], "no run here has a plan"),
    ],
)
def test_a_mistake_costs_one_message(
    words: list[str], message: str, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", *(str(recipe_file) if word == "RECIPE" else word for word in words)]
    if words == []:
        arguments.append("--json")
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert "Traceback" not in found.err


def test_questions(capsys: pytest.CaptureFixture[str]) -> None:
    """A budget in FLOPs, days and money; failures and what a change buys."""
    assert "60B tokens" in said(capsys, "budget", "--flops", "1e21")
    days = said(capsys, "budget", "--on", "8xH100", "--days", "3", "--data", "2e9")
    assert "8 devices" in days
    assert "more epochs no longer help" in days
    assert "days on 8 devices" in said(capsys, "budget", "--on", "8xH100", "--money", "5000")
    played = said(capsys, "failures", "--devices", "1024", "--days", "5", "--what-if", "restart=60")
    assert "goodput" in played
    assert "days saved" in played


def test_serving_of_a_model(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "serving", tiny_llama_dir, "--on", "1xL4", "--context", "128", "--batch", "4")
    assert "batch 4" in text
    assert "tokens/s" in text


def test_a_run_keeps_its_plan_and_says_how_it_came_true(
    make_recipe: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and states to the byte; the report and `plan --accuracy` show each beside the other; and
    where the machine was calibrated, the next plan is nearer."""
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    rates = Rates(products=1e11, memory=1e10, attention=1e11, launch=1e-5, update=1e10, error=0.1)
    Calibration("here", cpu_kind(), 1, "2", {"float32": rates}, disk=1e9).save()
    result = rw.train(make_recipe(steps=4), progress=False)
    run = RunDirectory.open(result.run)
    found = {one.what: one for one in outcomes(run)}
    assert {"seconds a step", "bytes of weights", "bytes of states"} <= set(found)
    assert found["bytes of weights"].predicted == found["bytes of weights"].measured
    assert found["bytes of states"].error == pytest.approx(0, abs=1e-3)  # counts of updates are left out
    report = (result.run / "report.md").read_text()
    assert "## As planned?" in report
    assert "seconds a step" in report
    text = said(capsys, "--accuracy", result.run.parent)
    assert result.run.name in text
    assert len(accuracy(result.run.parent)) == len(found)
    learnt = calibration(cpu_kind())
    assert learnt is not None
    slower = found["seconds a step"].measured > found["seconds a step"].predicted
    assert (learnt.corrections["float32"] > 1) == slower
    with pytest.raises(UserError, match="no run here"):
        accuracy(tmp_path / "cache")


def test_processes_share_what_was_measured_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two of two cores are no faster than one of both; and no rate is above the peak."""
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: Machine(cores=2, cpu_bfloat16=True)))
    rates = Rates(products=1e13, memory=1e10, attention=8e12, launch=1e-5, update=1e10, error=0.1)
    Calibration("here", cpu_kind(), 2, "2", {"bfloat16": rates}, disk=1e9).save()
    one, two = (here(processes, "bfloat16", "cpu").accelerator for processes in (1, 2))
    for device, part in ((one, 1), (two, 0.5)):
        assert device.matmul == 1
        assert device.peak_of("bf16") == part * rates.products
        assert device.attention * device.peak_of("bf16") == pytest.approx(part * rates.attention)
        assert device.memory_share * device.memory_bandwidth == pytest.approx(part * rates.memory)
        assert (device.update, device.launch) == (part * rates.update, rates.launch)
