"""track: a run directory keeps what happened, and gives it back in order."""

import json
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from ropewalk.errors import RopewalkError, UserError
from ropewalk.track import RunDirectory, diff_runs, environment, list_runs, summarize
from ropewalk.track.environment import git_commit


def new_run(root: Path, name: str = "a", id: str = "1", recipe: str = "seed: 1\n") -> RunDirectory:
    return RunDirectory.create(root, name, recipe, {"data": {"fingerprint": "f"}}, id=id)


def train_record(step: int, **more: object) -> dict[str, object]:
    record = {"kind": "train", "step": step, "loss": 1.0 / step, "tokens": 10, "tokens_seen": 10 * step}
    return {**record, "train_seconds": 0.5 * step, **more}


def test_create_lays_out_the_directory(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "name", "seed: 1\n", {"x": 1})
    assert run.path.name.startswith("name-")
    assert (run.path / "recipe.yaml").read_text() == "seed: 1\n"
    assert run.read_json("lineage.json") == {"x": 1}
    assert run.samples_path.is_dir()
    assert run.checkpoints_path.is_dir()


def test_two_runs_of_one_name_do_not_meet(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, "a", "", {}).path != RunDirectory.create(tmp_path, "a", "", {}).path


def test_an_existing_run_is_refused_and_untouched(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.log({"step": 1})
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"a-1: this run exists.*ropewalk resume"):
        new_run(tmp_path, recipe="seed: 2\n")
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(tmp_path / "missing")


def test_log_appends_lines_that_others_can_read_at_once(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in (1, 2):
        run.log(train_record(step))
        assert RunDirectory.open(run.path).read()[-1]["step"] == step
    run.log({"step": 1}, writer="worker-1")
    assert len(run.read()) == 2
    assert run.read("worker-1") == [{"step": 1}]
    assert run.read("nobody") == []


def test_a_torn_last_line_is_dropped_and_damage_before_it_is_named(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.log({"step": 1})
    with run.metrics_path().open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.read() == [{"step": 1}]
    run.metrics_path().write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RopewalkError, match=r"metrics-train\.jsonl:2"):
        run.read()


def test_truncate_then_log_gives_each_step_once(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in range(1, 6):
        run.log({"step": step})
    with run.metrics_path().open("a") as file:
        file.write('{"step": 6, "lo')
    kept = run.truncate(3)
    run.log({"step": 4})
    assert kept == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert [record["step"] for record in run.read()] == [1, 2, 3, 4]


def test_only_one_process_trains_a_run(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert not run.locked()
    code = "import sys; from ropewalk.track import RunDirectory as R; R.open(sys.argv[1]).lock().__enter__()"
    with run.lock():
        done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
        assert "another process is training this run" in done.stderr
        assert run.locked()
    assert subprocess.run([sys.executable, "-c", code, str(run.path)]).returncode == 0


def test_summaries_and_their_order(tmp_path: Path) -> None:
    first, second = new_run(tmp_path, "b"), new_run(tmp_path, "a", recipe="seed: 2\n")
    for start, run in enumerate((first, second)):
        run.log({"kind": "start", "step": 0, "steps": 4, "time": float(start)})
        run.log({"kind": "validation", "step": 0, "loss": 3.0})
        for step in (1, 2):
            run.log(train_record(step))
    first.log({"kind": "validation", "step": 2, "loss": 2.0})
    first.write_text("report.md", "")
    (tmp_path / "broken-1").mkdir()
    (tmp_path / "broken-1" / "recipe.yaml").write_text("")
    (tmp_path / "broken-1" / "metrics-train.jsonl").write_text("x\ny\n")
    listed = {run.path.name: run for run in list_runs(tmp_path)}
    assert [name for name in listed if name != "broken-1"] == ["b-1", "a-1"]
    assert listed["broken-1"].status == "unreadable"
    done, stopped = listed["b-1"], listed["a-1"]
    assert (done.status, stopped.status) == ("finished", "stopped")
    assert (done.step, done.steps, done.loss, done.tokens_seen) == (2, 4, 0.5, 20)
    assert (done.validation_before, done.validation_after, stopped.validation_after) == (3.0, 2.0, None)
    assert done.tokens_per_second == pytest.approx(20.0)
    with first.lock():
        assert summarize(second.path).status == "stopped"
    with second.lock():
        assert summarize(second.path).status == "running"


def test_diff_says_what_differs_and_nothing_else(tmp_path: Path) -> None:
    first = new_run(tmp_path, recipe="seed: 1\ntrain: {steps: 3, x: [1, 2]}\n")
    second = new_run(tmp_path, id="2", recipe="seed: 1\ntrain: {steps: 4, x: [1, 3], y: 5}\n")
    assert diff_runs(first.path, first.path) == []
    assert diff_runs(first.path, second.path) == [
        ("recipe.train.steps", 3, 4),
        ("recipe.train.x[1]", 2, 3),
        ("recipe.train.y", None, 5),
    ]


def test_environment_is_json_and_names_versions() -> None:
    found = json.loads(json.dumps(environment(threads=2)))
    assert found["packages"]["torch"]
    assert found["threads"] == 2
    assert found["cores"] >= 1


def test_git_commit_marks_changes(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for words in (["init", "-q"], ["add", "f"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == commit + "+changes"


def test_track_does_not_import_torch() -> None:
    code = "import sys, ropewalk.track; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_logging_a_step_is_cheap(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    record = {f"some_measured_value_{i}": i / 7 for i in range(18)}
    seconds = min(timeit.repeat(lambda: run.log(record), number=200, repeat=5)) / 200
    assert seconds < 500e-6  # measured 15 µs, the write included; this only catches a blunder


def test_a_line_is_not_added_to_a_torn_one(tmp_path: Path) -> None:
    """As a full disk leaves it; a resume goes on in the files that it does not shorten, too."""
    run = new_run(tmp_path)
    for text, kept in (('{"step":1}\n{"st', [{"step": 1}]), ('{"st', []), ("", [])):
        run.metrics_path("life").write_text(text)
        assert run.read("life") == kept
        again = RunDirectory.open(run.path)
        again.log({"step": 2}, "life")
        assert again.read("life") == [*kept, {"step": 2}]


def test_a_record_that_is_no_object_is_damage(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.metrics_path().write_text('{"step":1}\n17\n{"step":2}\n')
    with pytest.raises(RopewalkError, match=r"metrics-train.jsonl:2: broken record \(not a JSON object\)"):
        run.read()
    (summary,) = list_runs(tmp_path)
    assert summary.status == "unreadable"


def test_looking_at_a_run_writes_nothing_in_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    before = sorted(run.path.iterdir())
    assert summarize(run.path).status == "stopped"
    assert sorted(run.path.iterdir()) == before
    with run.lock():
        assert summarize(run.path).status == "running"
    assert summarize(run.path).status == "stopped"
