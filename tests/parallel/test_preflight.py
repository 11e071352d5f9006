"""Processes that do not fit together say so in one message, in seconds, before anything is loaded."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ropewalk as rw
from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.parallel.launch import launch
from ropewalk.parallel.preflight import CLOCKS, Facts, meet, problems
from ropewalk.track.environment import versions

Answers = list[dict[str, Any]]


@pytest.fixture
def meeting(tmp_path: Path) -> Callable[..., Answers]:
    """`meeting({...}, {...})`: what two real processes say that differ from a good pair in these."""

    def run(*differences: dict[str, Any]) -> Answers:
        good = {"folder": str(tmp_path / "runs"), "versions": {"torch": "2.13.0"}}
        (tmp_path / "cases.json").write_text(json.dumps([good | one for one in differences]))
        words = [str(Path(__file__).with_name("preflight_worker.py")), str(tmp_path / "cases.json")]
        assert launch(words, len(differences)) == 0
        return [json.loads((tmp_path / f"{i}.answer").read_text()) for i in range(len(differences))]

    return run


def test_a_good_pair_is_quick_and_leaves_nothing(meeting: Callable[..., Answers], tmp_path: Path) -> None:
    first, second = meeting({}, {})
    assert first["said"] == second["said"] == ""
    assert max(first["seconds"], second["seconds"]) < 10
    assert list((tmp_path / "runs").iterdir()) == []


def test_all_problems_are_in_the_first_ones_message(meeting: Callable[..., Answers], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first, second = meeting(
        {"host": "node1", "clock": 1000.0, "versions": {"torch": "2.13.0", "python": "3.12.1"}},
        {"host": "node2", "clock": 1060.0, "versions": {"torch": "2.11.0", "python": "3.12.1"}}
        | {"folder": str(tmp_path / "elsewhere")},
    )
    title, *lines = first["said"].splitlines()
    assert title == "these processes cannot train together:"
    version, clock, folder = (line.strip() for line in lines)
    assert version == (
        "different versions of torch: 2.13.0 in process 0 on node1, 2.11.0 in process 1 on node2; "
        "install the same everywhere"
    )
    assert clock.startswith("the clock of node2 is 60 s ahead of the others'")
    assert folder.startswith(f"{tmp_path / 'runs'}: process 1 on node2: does not see what process 0")
    assert second["said"] == "process 1 ends: process 0 says why"
    assert list((tmp_path / "runs").iterdir()) == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_once_before_data_are_prepared(
    make_recipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    recipe = make_recipe(batch_size=4) | {"parallel": {"shard": 2}, "runs": str(tmp_path / "file" / "runs")}
    with pytest.raises(UserError, match=r"process 0 on .*: cannot write there .*Not a directory") as caught:
        rw.train(recipe, progress=False)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "prepared").exists()


def test_a_meeting_place_that_cannot_be_resolved_is_said_at_once(make_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(make_recipe()))
    began = time.monotonic()
    done = subprocess.run(
        [Path(sys.executable).with_name("ropewalk"), "train", str(tmp_path / "recipe.yaml")],
        env=os.environ
        | {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "no-such-machine.invalid", "MASTER_PORT": "29500"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "process 1 on " in done.stderr
    assert "MASTER_ADDR, where the processes meet, is 'no-such-machine.invalid'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 60


def test_more_processes_than_gpus_are_said_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.cuda.device_count()
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": there, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"process 3 on .* number {there + 1} .* shows {there} GPU"):
        meet("cuda", Layout(), Path("runs"), versions)


def test_what_is_compared() -> None:
    """Of this very code: Python, packages and, once for each machine, its git commit."""
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "ropewalk", "transformers"} <= found.keys()
    assert {*found} - {*versions(whole=False)} <= {"ropewalk's git commit"}


def facts(host: str, *ranks: int, **more: Any) -> list[Facts]:
    return [Facts(rank, host, versions={"torch": "2.13.0"}, **more) for rank in ranks]


def test_nothing_wrong_is_nothing_said() -> None:
    on_gpus = [replace(one, gpu=f"GPU-{one.rank}") for one in facts("node1", 0, 1) + facts("node2", 2, 3)]
    assert problems(on_gpus, "runs") == []
    assert problems(facts("node1", 0, 1), "runs") == []  # on CPUs


def test_where_processes_meet_is_nobody_elses(tmp_path: Path) -> None:
    """Many runs begin at once on a machine: a port that was only looked for may be another's by then."""
    script = tmp_path / "taken.py"
    script.write_text(
        "import os, socket\n"
        "try:\n"
        "    socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
        "except OSError:\n"
        "    raise SystemExit(0)\n"
        "raise SystemExit(3)\n"
    )
    assert launch([str(script)], 2) == 0


def test_two_processes_on_one_gpu_are_named() -> None:
    (said,) = problems([*facts("node1", 0, 1, gpu="GPU-a"), *facts("node1", 2, gpu="GPU-b")], "runs")
    assert said.startswith("one GPU for several: processes 0-1 on node1 have GPU-a;")


def test_versions_name_all_processes_in_short_and_what_is_unknown_is_no_difference() -> None:
    old = [replace(one, versions={"torch": "2.11.0"}) for one in facts("node2", 4, 5, 6, 9)]
    unknown = [replace(one, versions={}) for one in facts("node3", 10)]
    (said,) = problems(facts("node1", 0, 1, 2, 3) + old + unknown, "runs")
    assert "2.13.0 in processes 0-3 on node1, 2.11.0 in processes 4-6, 9 on node2;" in said


@pytest.mark.parametrize(("late", "told"), [(CLOCKS - 0.1, False), (CLOCKS + 0.1, True)])
def test_clocks_may_differ_by_what_the_docs_say(late: float, told: bool) -> None:
    hosts = [one for i in range(3) for one in facts(f"node{i}", 2 * i, 2 * i + 1, clock=50.0)]
    slow = facts("slow", 6, 7, clock=50.0 - late)
    said = problems(hosts + slow, "runs")
    assert [line.startswith("the clock of slow is 5 s behind the others'") for line in said] == [True] * told


def test_a_reading_that_came_late_is_not_a_wrong_clock() -> None:
    late = facts("b", 1, clock=99.0) + facts("b", 2, clock=10.1)
    assert problems(facts("a", 0, clock=10.0) + late, "runs") == []


def test_a_read_only_folder_names_its_processes() -> None:
    why = "cannot write there (Read-only file system)"
    (said,) = problems(facts("node1", 0) + facts("node2", 1, 2, unwritable=why), "/runs")
    assert said.startswith(f"/runs: processes 1-2 on node2: {why}; set runs to")


def test_a_slip_of_the_pen_does_not_start_a_thousand_processes() -> None:
    with pytest.raises(UserError, match=r"parallel: 1000 processes on this machine of \d+ cores"):
        launch(["-c", "raise SystemExit(7)"], 1000)
