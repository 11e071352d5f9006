"""Many runs in one set of processes: starting processes takes longer than what they do here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ropewalk.parallel.launch import launch

Runs = dict[str, dict[str, Any]]
"""By name, the fields of a TrainResult."""


@pytest.fixture(scope="module")
def train_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, dict[str, Any]], Runs]:
    """`train_in(2, {name: ("train", [recipe, [], False])})`: calls of ropewalk.train.entry in 2 processes."""

    def run(processes: int, calls: dict[str, Any]) -> Runs:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps(calls, default=str))
        status = launch([str(Path(__file__).with_name("worker.py")), str(folder / "jobs.json")], processes)
        assert status == 0
        return {name: json.loads((folder / f"{name}.result").read_text()) for name in calls}

    return run


@pytest.fixture
def until(tmp_path: Path) -> Callable[..., Path]:
    """`until(run, "copy")`: a copy of a run of 6 steps as it was at its checkpoint of step 3."""

    def copy(run: str | Path, name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(run, target)
        (target / "report.md").unlink()
        shutil.rmtree(target / "checkpoints" / "step-00000006")
        return target

    return copy
