"""resume: from any step, after any end, the run becomes the one that was never interrupted, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.errors import RopewalkError, UserError

Make = Callable[..., dict[str, Any]]
Trace = Callable[[Path], list[dict[str, Any]]]
Copy = Callable[[Path, int, Path], Path]
CASES = {
    "full-float32": {"precision": "float32"},
    "full-bfloat16": {"precision": "bfloat16"},
    "lora-float32": {"precision": "float32", "adapt": {"method": "lora", "rank": 4, "dropout": 0.2}},
    "lora-bfloat16": {"precision": "bfloat16", "adapt": {"method": "lora", "rank": 4, "dropout": 0.2}},
}


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds: optimizer, generators and the weights that others read."""
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert len(files) == 2
    return {
        f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_any_step_equals_uninterrupted(
    copy_until: Copy, make_recipe: Make, trace: Trace, tmp_path: Path, case: str
) -> None:
    """With packing, two micro-batches a step, an epoch's end on the way, and dropout under LoRA."""
    recipe = make_recipe(steps=7, checkpoint_every=1, evaluate_every=2, keep=9, **CASES[case])
    whole = rw.train(recipe, progress=False).run
    expected, tensors = trace(whole), tensors_of(whole, 7)
    for step in (1, 2, 4, 6):
        run = copy_until(whole, step, tmp_path / f"from-{step}")
        result = rw.resume(run, progress=False)
        assert (result.step, result.interrupted, len(result.losses)) == (7, False, 7 - step)
        assert trace(run) == expected
        assert_same(tensors_of(run, 7), tensors)
        assert (run / "report.md").exists()


def test_a_run_without_a_checkpoint_starts_again(
    copy_until: Copy, make_recipe: Make, trace: Trace, tmp_path: Path
) -> None:
    whole = rw.train(make_recipe(steps=3), progress=False).run
    expected, tensors = trace(whole), tensors_of(whole, 3)
    run = copy_until(whole, 0, tmp_path / "again")
    rw.resume(run, progress=False)
    assert trace(run) == expected
    assert_same(tensors_of(run, 3), tensors)


def test_a_finished_run_says_so_and_stays_as_it_is(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rw.train(make_recipe(steps=2), progress=False).run
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    result = rw.resume(run)
    assert (result.step, result.losses) == (2, [])
    assert "all 2 steps are done" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_stop_before_a_measurement_is_made_up_for(
    make_recipe: Make, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in step 4, where a validation is due: it is not waited for, and not missing later."""
    from ropewalk.train import loop

    recipe = make_recipe(steps=6, checkpoint_every=4, evaluate_every=2)
    whole = rw.train({**recipe, "runs": str(tmp_path / "whole")}, progress=False)
    sound = loop.train_step

    def signalled(job: Any, batches: Any) -> dict[str, Any]:
        if job.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sound(job, batches)

    monkeypatch.setattr(loop, "train_step", signalled)
    stopped = rw.train(recipe, progress=False)
    monkeypatch.undo()
    assert (stopped.step, stopped.interrupted, len(stopped.losses)) == (4, True, 4)
    manifest = stopped.run / "checkpoints" / "step-00000004" / "MANIFEST.json"
    assert json.loads(manifest.read_text())["validation_loss"] is None
    assert not (stopped.run / "report.md").exists()
    resumed = rw.resume(stopped.run, progress=False)
    assert trace(resumed.run) == trace(whole.run)
    measured = [r["loss"] for r in trace(whole.run) if r["kind"] == "validation" and r["step"] == 4]
    assert [json.loads(manifest.read_text())["validation_loss"]] == measured
    assert resumed.validation_before == whole.validation_before


def test_damage_is_said_aloud_and_the_one_before_is_used(
    copy_until: Copy, make_recipe: Make, trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = rw.train(make_recipe(steps=5, checkpoint_every=1, keep=9), progress=False).run
    expected, tensors = trace(whole), tensors_of(whole, 5)
    run = copy_until(whole, 4, tmp_path / "damaged")
    flipped = run / "checkpoints" / "step-00000004" / "model" / "model.safetensors"
    raw = bytearray(flipped.read_bytes())
    raw[-10] ^= 16
    flipped.write_bytes(raw)
    cut = run / "checkpoints" / "step-00000003" / "state" / "tensors.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    result = rw.resume(run, progress=False)
    said = capsys.readouterr().err
    assert str(flipped) in said
    assert str(cut) in said
    assert len(result.losses) == 3
    assert trace(run) == expected
    assert_same(tensors_of(run, 5), tensors)


def test_a_changed_source_does_not_matter_but_lost_data_does(
    copy_until: Copy, make_recipe: Make, corpus: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mine.jsonl"
    shutil.copy(corpus, source)
    recipe = make_recipe(steps=3, checkpoint_every=1, keep=9, data={"train": [{"path": str(source)}]})
    whole = rw.train(recipe, progress=False).run
    tensors = tensors_of(whole, 3)
    source.write_text(source.read_text().replace("rope", "ROPE"))
    run = copy_until(whole, 1, tmp_path / "changed")
    rw.resume(run, progress=False)
    assert_same(tensors_of(run, 3), tensors)
    shutil.rmtree(tmp_path / "prepared")
    run = copy_until(whole, 1, tmp_path / "lost")
    with pytest.raises(UserError, match="put it back"):
        rw.resume(run, progress=False)


def test_another_base_model_under_the_adapters_is_refused(
    copy_until: Copy, make_recipe: Make, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    model = {"source": str(base)}
    whole = rw.train(
        make_recipe(steps=2, checkpoint_every=1, model=model, adapt={"method": "lora"}), progress=False
    )
    run = copy_until(whole.run, 1, tmp_path / "run")
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="no longer the model"):
        rw.resume(run, progress=False)


def test_two_processes_do_not_resume_one_run(make_recipe: Make) -> None:
    from ropewalk.track import RunDirectory

    run = rw.train(make_recipe(steps=1), progress=False).run
    with RunDirectory.open(run).lock(), pytest.raises(UserError, match="another process"):
        rw.resume(run, progress=False)


TRAIN = "import sys, json, ropewalk as rw; rw.train(json.load(open(sys.argv[1])))"
RESUME = "import sys, ropewalk as rw; rw.resume(sys.argv[1])"
PATIENCE = 300
"""Seconds; a process takes three of them to start, or a hundred on a machine that does five other things."""


def start(code: str, argument: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(argument)], stderr=subprocess.PIPE, text=True)


def kill_after(
    process: subprocess.Popen[str], runs: Path, lines: int, number: signal.Signals, wait: float
) -> str:
    """Sends a signal `wait` seconds after the metrics have so many lines; what the process said."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        metrics = next(runs.glob("*/metrics-train.jsonl"), None)
        if metrics is not None and len(metrics.read_text().splitlines()) >= lines:
            time.sleep(wait)
            break
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid, number)
    return process.communicate(timeout=PATIENCE)[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_killed_at_random_points_ends_as_the_uninterrupted_one(
    make_recipe: Make, trace: Trace, tmp_path: Path, number: signal.Signals
) -> None:
    chance = random.Random(number)
    fields = {"checkpoint_every": 2, "evaluate_every": 4, "keep": 3, **CASES["lora-bfloat16"]}
    recipe = make_recipe(steps=40, **fields)
    whole = rw.train({**recipe, "runs": str(tmp_path / "whole")}, progress=False).run
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    runs = Path(recipe["runs"])
    said = kill_after(
        start(TRAIN, tmp_path / "recipe.json"), runs, chance.randint(3, 20), number, chance.random() / 20
    )
    run = next(runs.iterdir())
    assert not (run / "report.md").exists(), "the signal came too late for this test to test anything"
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} after step" in said
        assert f"ropewalk resume {run}" in said
    lines = len((run / "metrics-train.jsonl").read_text().splitlines()) + chance.randint(1, 6)
    kill_after(start(RESUME, run), runs, lines, number, chance.random() / 20)
    if not (run / "report.md").exists():
        assert start(RESUME, run).wait(PATIENCE) == 0
    assert trace(run) == trace(whole)
    assert_same(tensors_of(run, 40), tensors_of(whole, 40))
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_second_interrupt_aborts_at_once(make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(make_recipe(steps=100_000)))
    process = start(TRAIN, tmp_path / "recipe.json")
    runs = Path(make_recipe()["runs"])
    while next(runs.glob("*/metrics-train.jsonl"), None) is None:
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(200):
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.001)
    assert "KeyboardInterrupt" in process.communicate(timeout=PATIENCE)[1]


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ropewalk.train import saving

    free = iter([10**9, 10**9, 10**9, 500])  # before the run, and before each save
    monkeypatch.setattr(saving, "free_bytes", lambda _: next(free))
    with pytest.raises(RopewalkError, match=r"step-00000003: the disk is full \([\d,]+ bytes needed"):
        rw.train(make_recipe(checkpoint_every=1), progress=False)
    run = next(Path(make_recipe()["runs"]).iterdir())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    assert rw.resume(run, progress=False).step == 6
