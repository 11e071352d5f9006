"""What is said of a run in several processes when more than one of them ends with an error."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ropewalk import train
from ropewalk.errors import RopewalkError, UserError
from ropewalk.track import RunDirectory
from ropewalk.train import worker
from ropewalk.train.together import run_of, together

LOST = ConnectionResetError("connection closed by peer")
MISTAKE = UserError("data.train: no such file")
FULL = RopewalkError("the disk is full")


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        ((LOST, MISTAKE), UserError, "no such file"),
        ((FULL, MISTAKE), UserError, "no such file"),
        ((LOST, FULL), RopewalkError, "the disk is full"),
        ((FULL, LOST), RopewalkError, "the disk is full"),
        ((LOST, LOST), RopewalkError, "connection closed by peer"),
    ],
)
def test_a_users_mistake_is_what_is_said_whichever_process_found_it(
    raised: tuple[Exception, ...], kind: type, said: str, monkeypatch: Any, tmp_path: Path
) -> None:
    """The processes run here, one after the other: each raises its error in the call that it is given."""

    def launch(arguments: list[str], processes: int, _: Any) -> int:
        statuses = []
        for rank, error in enumerate(raised):

            def call(error: Exception = error) -> None:
                raise error

            monkeypatch.setattr(train, "train", call)
            monkeypatch.setattr(sys, "argv", arguments[1:])
            monkeypatch.setenv("RANK", str(rank))
            statuses.append(worker.main())
        assert len(statuses) == processes
        return next(status for status in statuses if status)

    monkeypatch.setattr("ropewalk.train.together.launch", launch)
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda _: worker)  # this process shall outlive its parent
    monkeypatch.setattr(worker, "prctl", lambda *_: 0, raising=False)
    with pytest.raises(kind, match=said) as caught:
        together("train", [], 2, 3, str(tmp_path), "run")
    assert type(caught.value) is kind


def test_a_job_finds_its_own_run_and_not_that_of_a_longer_name(tmp_path: Path) -> None:
    """One SLURM job may train `base`, then `base-lora`, and be started again."""
    assert run_of("SLURM_JOB_ID=7", str(tmp_path), "base") is None
    runs = [RunDirectory.create(tmp_path, name, "", {}) for name in ("base", "base-lora")]
    for run in runs:
        run.write_json("environment.json", {"job": "SLURM_JOB_ID=7"})
    for run, name in zip(runs, ("base", "base-lora"), strict=True):
        assert run_of("SLURM_JOB_ID=7", str(tmp_path), name) == run.path
        assert run_of("SLURM_JOB_ID=8", str(tmp_path), name) is None
    runs[0].write_text("report.md", "done")
    assert run_of("SLURM_JOB_ID=7", str(tmp_path), "base") is None
