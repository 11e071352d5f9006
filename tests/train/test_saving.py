"""saving: the run waits for a copy only, one save is under way, and what goes wrong in it is said."""

import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ropewalk as rw
from ropewalk.errors import RopewalkError
from ropewalk.parallel import World, load_tensors
from ropewalk.train import host_memory, saving
from ropewalk.train.cadence import young_interval
from ropewalk.train.checkpoint import find_damage, list_checkpoints
from ropewalk.train.saving import Contents, Saver, check_room

Make = Callable[..., dict[str, Any]]


def contents(step: int, tensors: dict[str, torch.Tensor]) -> Contents:
    def save_model(path: Path, _: object) -> None:
        path.mkdir()

    return Contents(step, tensors, trained={}, frozen={}, state="{}", save_model=save_model, needed=1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints take half a second more."""
    sound = saving.write_manifest

    def write(*arguments: Any) -> None:
        time.sleep(0.5)
        sound(*arguments)

    monkeypatch.setattr(saving, "write_manifest", write)


@pytest.mark.parametrize("memory", [10**12, 0])
def test_what_changes_after_begin_is_not_in_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow: None, memory: int
) -> None:
    """With memory for a copy training goes on at once; without, only when all is written."""
    monkeypatch.setattr(host_memory, "free_memory", lambda: memory)
    tensors = {
        "master.a": torch.arange(1000.0),
        "exp_avg.a": torch.ones(7, 3, dtype=torch.bfloat16),
        "step.a": torch.tensor(2.0),
        "random": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }
    wanted = {name: tensor.clone() for name, tensor in tensors.items() if tensor.numel()}
    saver = Saver(folder, keep=2)
    for step in (1, 2):  # the second time in the same memory
        began = time.perf_counter()
        path = saver.begin(contents(step, tensors), copy=True)
        saver.settle()
        waited = time.perf_counter() - began
        assert (waited < 0.3) == (memory > 0)
        assert saver.busy
        for tensor in tensors.values():
            tensor.zero_()
        saved = saver.finish()
        assert saved is not None
        assert (saved.step, saved.path, saver.busy) == (step, path, False)
        assert saved.seconds >= 0.5
        found = load_tensors(path / "state", {}, World())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for name, tensor in wanted.items():
            tensors[name].copy_(tensor)
    assert saver.poll() is None


def test_an_error_in_the_thread_is_raised_and_the_checkpoint_before_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(folder, keep=1)
    saver.begin(contents(1, {}), copy=True)
    saver.finish()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", fail)
    saver.begin(contents(2, {}), copy=True)
    message = r"step-00000002: the disk is full \(1,000 bytes needed.*before, up to step-00000001, are kept"
    with pytest.raises(RopewalkError, match=message):
        saver.finish()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_run_ends_with_the_error_of_its_save(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next step; what was saved before is whole, and the run goes on from there."""
    sound = saving.write_manifest

    def fail(checkpoint: Path, step: int, *rest: Any) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        sound(checkpoint, step, *rest)

    monkeypatch.setattr(saving, "write_manifest", fail)
    recipe = make_recipe(steps=60, checkpoint_every=1, keep=9)
    with pytest.raises(RopewalkError, match=r"step-00000002: the disk is full .* step-00000001, are kept"):
        rw.train(recipe, progress=False)
    (run,) = Path(recipe["runs"]).iterdir()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert rw.resume(run, progress=False).step == 60


def test_an_error_elsewhere_waits_for_the_save(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, slow: None
) -> None:
    from ropewalk.train import loop

    sound = loop.train_step

    def fail(job: Any, batches: Any) -> dict[str, Any]:
        if job.step == 3:
            raise RopewalkError("no more")
        return sound(job, batches)

    monkeypatch.setattr(loop, "train_step", fail)
    recipe = make_recipe(steps=6, checkpoint_every=2)
    with pytest.raises(RopewalkError, match="no more"):
        rw.train(recipe, progress=False)
    (run,) = Path(recipe["runs"]).iterdir()
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000002"
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_slow_copy_is_waited_for_before_the_update(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, in_backward: bool
) -> None:
    """What is saved beside the next step is what is saved while the run waits."""
    recipe = make_recipe(steps=4, batch_size=2, clip=0.0, optimizer={"in_backward": in_backward})
    recipe["train"] |= {"checkpoint_every": 1, "keep": 9}
    states = []
    for memory in (10**12, 0):
        with monkeypatch.context() as patch:
            patch.setattr(host_memory, "free_memory", lambda memory=memory: memory)
            patch.setattr(saving, "fill", slow_fill)
            run = rw.train(recipe, progress=False).run
        saved = list_checkpoints(run / "checkpoints")
        states.append([load_tensors(path / "state", {}, World()) for path in saved])
    beside, waited = states
    assert len(beside) == len(waited) == 4
    for ours, theirs in zip(beside, waited, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def slow_fill(copies: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    time.sleep(0.3)
    host_memory.fill(copies, tensors)


def test_steps_are_done_while_a_checkpoint_is_written(make_recipe: Make, slow: None) -> None:
    run = rw.train(make_recipe(steps=40, checkpoint_every=4, keep=99), progress=False).run
    records = [json.loads(line) for line in (run / "metrics-train.jsonl").read_text().splitlines()]
    order = [(r["kind"], r["step"]) for r in records if r["kind"] != "validation"]
    # its record comes when it is whole: after steps that were done meanwhile, before the next save
    assert order.index(("checkpoint", 4)) > order.index(("train", 5))
    assert order.index(("checkpoint", 4)) < order.index(("checkpoint", 8))
    saves = [r for r in records if r["kind"] == "checkpoint"]
    assert [r["step"] for r in saves] == list(range(4, 41, 4))
    assert all(r["write_seconds"] >= 0.5 for r in saves)
    assert saves[-1]["seconds"] >= 0.5  # nothing goes on after the last one
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [r["path"] for r in saves]


@pytest.mark.parametrize(("save", "failure"), [(10.0, 86400.0), (0.5, 3600.0), (60.0, 20 * 3600.0)])
def test_youngs_interval_loses_least(save: float, failure: float) -> None:
    """Against the closed form, and against the smallest of the losses at many intervals."""
    assert young_interval(save, failure) == pytest.approx((2 * save * failure) ** 0.5)
    intervals = [young_interval(save, failure) * (1 + k / 1000) for k in range(-900, 3000)]
    losses = {interval: save / interval + interval / (2 * failure) for interval in intervals}
    assert min(intervals, key=lambda i: losses[i]) == pytest.approx(young_interval(save, failure), rel=2e-3)


def steps_saved(recipe: dict[str, Any]) -> list[int]:
    run = rw.train(recipe, progress=False).run
    return [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]


def test_the_clock_by_youngs_rule(make_recipe: Make) -> None:
    """The first save is made after the first step, to be measured; then as rarely as failures allow."""
    fields = {"steps": 6, "keep": 99, "checkpoint_minutes": "auto"}
    assert steps_saved(make_recipe(**fields, failure_hours=1e9)) == [1, 6]
    # as often as can be: whenever none is being written
    assert len(steps_saved(make_recipe(**fields | {"steps": 200, "keep": 999}, failure_hours=1e-12))) > 2
    with pytest.raises(RopewalkError, match=r"auto and train\.failure_hours go together"):
        rw.train(make_recipe(checkpoint_minutes="auto"), progress=False)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("saves", "keep", "best", "count"),
    [(1, 2, True, 1), (9, 2, False, 3), (9, 2, True, 4), (None, 1, False, 2)],
)
def test_room_for_what_a_run_keeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, saves: int | None, keep: int, best: bool, count: int
) -> None:
    (folder / "there").write_bytes(b"x" * 300)
    enough = count * 1000 - 300
    for free in (enough, enough - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        if free == enough:
            check_room(folder, 1000, saves=saves, keep=keep, best=best)
            continue
        with pytest.raises(
            RopewalkError, match=rf"{count} of 1,000 bytes \(train.keep is {keep}\), {free:,} bytes free"
        ):
            check_room(folder, 1000, saves=saves, keep=keep, best=best)


def test_a_disk_too_small_is_said_before_the_run(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is what a checkpoint takes, to within its small files."""
    recipe = make_recipe(steps=4, checkpoint_every=2, keep=1)
    found = rw.train(recipe, progress=False)
    weights = sum(path.stat().st_size for path in found.checkpoint.rglob("*.safetensors"))
    shutil.rmtree(recipe["runs"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    with pytest.raises(RopewalkError, match="no room for the run's checkpoints, 2 of") as caught:
        rw.train(recipe, progress=False)
    estimate = int(str(caught.value).split("2 of ")[1].split(" bytes")[0].replace(",", ""))
    assert estimate == pytest.approx(weights, rel=0.1)
    assert not Path(recipe["runs"]).exists()
