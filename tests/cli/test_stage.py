"""Headings and progress of long commands."""

import io

import pytest
from rich.console import Console

import ropewalk.stage
from ropewalk.stage import Stage


def test_a_stage_says_its_name_and_its_seconds():
    out = io.StringIO()
    with Stage("1/2 prepare [x]", Console(file=out)) as stage:
        pass
    assert out.getvalue().splitlines()[0] == "== 1/2 prepare [x]"
    assert out.getvalue().splitlines()[1].endswith(" s")
    assert stage.seconds > 0


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(ropewalk.stage.time, "perf_counter", lambda: clock[0])
    with Stage("s", Console(file=out)) as stage:
        for done in range(100):
            clock[0] = done * 1.0
            stage.progress("rows", done, 100)
    lines = [line for line in out.getvalue().splitlines() if "rows" in line]
    left = {15: "1:25", 30: "1:10", 45: "0:55", 60: "0:40", 75: "0:25", 90: "0:10"}
    assert lines == [f"   rows: {done}/100 (1 a second, {time} left)" for done, time in left.items()]


def test_a_failed_stage_gives_no_time_and_lets_the_error_through():
    out = io.StringIO()

    def fail() -> None:
        with Stage("s", Console(file=out, force_terminal=True)) as stage:
            stage.progress("rows", 1, 2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert " s\n" not in out.getvalue()
