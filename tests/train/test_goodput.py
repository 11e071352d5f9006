"""Goodput: every second since the first start is somewhere, also those that kills cost."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import ropewalk as rw
from ropewalk.track import RunDirectory
from ropewalk.train.goodput import LIFE, goodput, left_behind, note_start


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "run", "name: run\n", {})


def test_a_killed_and_resumed_run_adds_up(run: RunDirectory) -> None:
    note_start(run, 1000.0, 0.0, {})
    for step in range(1, 7):  # 10 s each, from 1005 on; the checkpoint of step 4 takes 2 s
        run.log({"kind": "train", "step": step, "train_seconds": 10.0 * step, "time": 1005.0 + 10 * step})
    run.log({"kind": "checkpoint", "step": 4, "seconds": 2.0})
    left = left_behind(run)
    assert left == {"last_time": 1065.0, "last_seconds": 60.0}
    run.truncate(4)
    note_start(run, 1100.0, 40.0, left)  # killed at 1065 at the latest: 35 s nobody ran, two steps again
    run.log({"kind": "validation", "step": 4, "loss": 1.0, "seconds": 3.0})
    found = goodput(run, train_seconds=80.0, now=1150.0)
    assert found.wall == 150.0
    assert found.useful == 80.0
    assert found.lost["steps done twice"] == 20.0
    assert found.lost["not running"] == 35.0
    assert found.lost["checkpoints"] == 2.0
    assert found.lost["validation"] == 3.0
    assert found.useful + sum(found.lost.values()) == pytest.approx(found.wall)
    assert str(found).startswith(
        "53.3% of 150 s in steps that count (2.0% validation, 1.3% checkpoints, 13.3%"
    )


def test_a_stop_in_good_order_loses_no_step(run: RunDirectory) -> None:
    note_start(run, 1000.0, 0.0, {})
    run.log({"kind": "train", "step": 1, "train_seconds": 10.0, "time": 1010.0})
    run.log({"kind": "end", "time": 1012.0}, LIFE)
    note_start(run, 1030.0, 10.0, left_behind(run))
    found = goodput(run, train_seconds=20.0, now=1045.0)
    assert found.lost["steps done twice"] == 0.0
    assert found.lost["not running"] == 18.0


def test_every_report_has_it_and_a_resume_does_not_begin_anew(make_recipe: Any, tmp_path: Path) -> None:
    whole = rw.train(make_recipe(steps=4, checkpoint_every=2, keep=9), progress=False)
    assert "| goodput |" in (whole.run / "report.md").read_text()
    target = tmp_path / "killed"
    shutil.copytree(whole.run, target)
    (target / "report.md").unlink()
    shutil.rmtree(target / "checkpoints" / "step-00000004")
    rw.resume(target, progress=False)
    assert "steps done twice" in (target / "report.md").read_text()
    assert [record["kind"] for record in RunDirectory(target).read(LIFE)] == ["start", "end"] * 2


def test_checkpoints_by_the_clock(make_recipe: Any) -> None:
    run = rw.train(make_recipe(steps=3, checkpoint_minutes=1e-9, keep=9), progress=False).run
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (1, 2, 3)
    ]
