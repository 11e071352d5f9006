"""The watchdog's sentence names the process that the others wait for, whatever became of it."""

import time
from pathlib import Path
from typing import Any

import pytest

from ropewalk.errors import RopewalkError
from ropewalk.train.watchdog import FIRST, LEAST, Watchdog, verdict


def note(rank: int, **changes: Any) -> dict[str, Any]:
    waits = {"phase": "update", "line": "train/optim.py:9", "collective": "all_reduce"}
    return {"rank": rank, "host": f"node{rank}", "step": 7, "seconds": 20.0, "time": 100.0} | waits | changes


def test_one_that_computes_something_else_is_named_with_its_line() -> None:
    late = note(2, phase="waiting for data", line="data/loader.py:176", collective=None)
    assert verdict([note(0), note(1), late], 3, 101.0, 5.0) == (
        "step 7 hangs: process 2 on node2 never came to all_reduce (update, train/optim.py:9), where 2 wait; "
        "it is in step 7, waiting for data (data/loader.py:176) for 20 s"
    )


def test_of_several_the_one_furthest_behind() -> None:
    slow, slower = (note(rank, collective=None, step=step) for rank, step in ((1, 7), (2, 6)))
    assert "process 2 on node2 never came" in verdict([note(0), slow, slower], 3, 101.0, 5.0)


def test_one_that_answers_no_more() -> None:
    said = verdict(
        [note(0), note(1, time=60.0, phase="forward and backward", collective=None)], 2, 101.0, 5.0
    )
    assert "process 1 on node1 never came to all_reduce" in said
    assert "it has not answered for 41 s, last seen in step 7, forward and backward" in said


def test_one_that_never_said_anything() -> None:
    assert "process 1 never came to all_reduce" in verdict([note(0)], 2, 101.0, 5.0)


def test_all_waiting_are_listed_with_their_operations() -> None:
    said = verdict([note(0), note(1, collective="broadcast")], 2, 101.0, 5.0)
    assert "all processes wait" in said
    assert "process 1 in broadcast (update, train/optim.py:9)" in said


def test_the_limit_is_learned_from_the_steps_and_does_not_hold_outside_of_them(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, 0, 2)
    watch.at(1, "forward and backward")
    assert watch.limit() == FIRST  # the first step compiles and allocates
    watch.at(1, "update")
    watch._began -= 30  # a step of 30 seconds
    watch.at(2, "waiting for data")
    assert watch.limit() == pytest.approx(300, rel=0.01)
    watch.at(2, "checkpoint")
    assert watch.limit() == FIRST
    quick = Watchdog(tmp_path, 0, 2)
    for step in (1, 2):
        quick.at(step, "update")
    assert quick.limit() == LEAST


def test_it_writes_down_where_the_main_thread_is(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, seconds=60.0) as watch:
        watch.at(3, "validation")
        place = watch._place()
    assert place["line"].startswith("train/watchdog.py:")
    assert place["collective"] is None
    assert (tmp_path / "watch" / "0.json").exists()


def test_telling_it_costs_nothing(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, 0, 2)
    began = time.perf_counter()
    for _ in range(1000):
        watch.at(1, "update")
    assert time.perf_counter() - began < 0.02


def test_a_note_that_cannot_be_written_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str) -> None:
        raise RopewalkError(f"{path}: the disk is full")

    with Watchdog(tmp_path, 0, 2, seconds=0.1) as watch:
        monkeypatch.setattr("ropewalk.train.watchdog.atomic_write", full)
        (tmp_path / "watch" / "0.json").unlink()
        time.sleep(0.1)
        watch.at(1, "update")
        assert watch._thread.is_alive()
        monkeypatch.undo()
        deadline = time.monotonic() + 30
        while not (tmp_path / "watch" / "0.json").exists():
            watch.at(1, "update")
            assert time.monotonic() < deadline
            time.sleep(0.01)
