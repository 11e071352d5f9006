"""One process of two is slow, meets a NaN, or computes and keeps wrong numbers: all stop or go on alike."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.data import Loader
from ropewalk.parallel.launch import launch

Make = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.slow


def with_faults(jobs: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("faulty_worker.py")
    assert launch([str(worker), str(folder / "jobs.json")], 2) == 0
    return {name: json.loads((folder / f"{name}.result").read_text()) for name in jobs}


def records(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    lines = Path(result["run"], "metrics-train.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_faults_of_one_process(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(layout: str = "shard", steps: int = 4, **train: Any) -> dict[str, Any]:
        fields = {"batch_size": 2, "micro_batch_size": 1, "checkpoint_every": 1, "keep": 9, **train}
        parallel = {"shard": 2} if layout == "shard" else {"shard": 1, layout: 2}
        return make_recipe(steps=steps, data={"validation_fraction": 0}, **fields) | {"parallel": parallel}

    slow = {"checkpoint_every": 0, "steps": 20}
    found = with_faults(
        {
            "skip": ("nan", recipe(spike={"policy": "skip"})),
            "rollback": ("nan", recipe("replicate", spike={"policy": "rollback"})),
            "sharded rollback": ("nan", recipe(spike={"policy": "rollback"})),
            "loss": ("other loss", recipe(verify_every=2)),
            "weight": ("flipped bit", recipe("replicate", verify_every=4)),
            "pipeline skip": ("nan", recipe("pipeline", spike={"policy": "skip"})),
            "head": ("flipped bit of the head", recipe("pipeline", verify_every=4)),
            "data": ("slow data", recipe(**slow)),
            "blocks": ("slow blocks", recipe(**slow)),
        },
        tmp_path,
    )
    host = socket.gethostname()

    # a NaN that one process has seen: both drop the update, or both go back
    assert [record["step"] for record in records(found["skip"], "skip")] == [3]
    assert [record["step"] for record in records(found["skip"], "train")] == [1, 2, 4]
    assert [record["step"] for record in records(found["pipeline skip"], "skip")] == [2]
    assert [record["step"] for record in records(found["pipeline skip"], "train")] == [1, 3, 4]
    before, after = (weights(found["skip"], step) for step in (2, 3))
    assert all(bool((before[name] == after[name]).all()) for name in before)
    with monkeypatch.context() as patch:  # one process, in whose data the third batch is not
        known = Loader.batch
        patch.setattr(Loader, "batch", lambda loader, at, rows: known(loader, at + 2 * (at >= 4), rows))
        reference = rw.train({**recipe(), "parallel": {}}, progress=False)
    for name in ("rollback", "sharded rollback"):
        assert [record["left_out"] for record in records(found[name], "rollback")] == [[[2]]]
        trained = records(found[name], "train")
        assert [record["step"] for record in trained] == [1, 2, 3, 4]
        assert [record["loss"] for record in trained] == pytest.approx(reference.losses, rel=1e-5)

    # numbers that are wrong without an error: the process that computed them is named, or both that differ
    said = found["loss"]["error"]
    assert said.startswith(f"step 2: process 1 on {host} computed another loss (")
    said = found["weight"]["error"]
    assert said.startswith(f"step 4: process 0 on {host} and process 1 on {host} hold different bits of ")

    said = found["head"]["error"]  # the embedding of a pipeline's other end
    assert said.startswith(f"step 4: process 0 on {host} and process 1 on {host} hold different bits of ")
    assert "embed.weight" in said

    # a process that is slow: named with what takes it so long
    for name in ("data", "blocks"):
        late = records(found[name], "straggler")
        assert late, name
        assert {(record["rank"], record["host"]) for record in late} == {(1, host)}
        column = {"data": "data_wait_seconds", "blocks": "forward_seconds"}[name]
        assert late[-1][column][1] > 2 * late[-1][column][0]
        report = Path(found[name]["run"], "report.md").read_text()
        assert f"| stragglers | process 1 on {host}: " in report


def weights(result: dict[str, Any], step: int) -> dict[str, Any]:
    return load_file(Path(result["run"], "checkpoints", f"step-{step:08d}", "model", "model.safetensors"))
