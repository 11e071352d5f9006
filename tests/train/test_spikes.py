"""Loss spikes: found by a robust score, and then stopped at, skipped or rolled back from, exactly."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.data import Loader
from ropewalk.errors import RopewalkError, UserError
from ropewalk.train.spikes import Spikes, robust_scores

Make = Callable[..., dict[str, Any]]
Trace = Callable[[Path], list[dict[str, Any]]]
ROWS = 4


def test_the_score_is_the_modified_z_score() -> None:
    """Against its definition in numpy; and it is in standard deviations for normal numbers."""
    past = np.random.default_rng(0).normal(3.0, 0.5, 4001)
    middle = np.median(past)
    wanted = 0.6745 * (np.array([3.1, 9.0, 1.0]) - middle) / np.median(np.abs(past - middle))
    assert robust_scores([3.1, 9.0, 1.0], past.tolist()) == pytest.approx(wanted.tolist())
    assert robust_scores([5.0], past.tolist())[0] == pytest.approx(4.0, rel=0.05)


def test_half_of_the_past_may_be_outliers_and_constant_losses_are_no_reason_to_worry() -> None:
    past = [2.0 + i / 100 for i in range(11)] + [50.0] * 10
    assert robust_scores([9.0], past)[0] < robust_scores([9.0], past[:11])[0] < 100 * 6
    assert robust_scores([60.0], past)[0] > 6
    assert robust_scores([2.05], [2.0] * 10)[0] < 2
    assert robust_scores([2.5], [2.0] * 10)[0] > 6


def test_nothing_is_called_a_spike_before_half_of_the_window() -> None:
    spikes = Spikes(window=6)
    for loss in (3.0, 3.1):
        spikes.keep(loss)
        assert spikes.score(1e9) is None
    spikes.keep(2.9)
    score = spikes.score(1e9)
    assert score is not None
    assert score > 1e6
    for loss in range(100):
        spikes.keep(loss)
    assert spikes.losses == [94, 95, 96, 97, 98, 99]


@pytest.mark.parametrize("left_out", [[], [[0]], [[3], [4]], [[2, 3], [7]], [[5], [1]]])
def test_steps_take_the_batches_that_are_not_left_out_in_order(left_out: list[list[int]]) -> None:
    spikes = Spikes(window=6, left_out=left_out)
    gone = {number for window in left_out for number in window}
    assert [spikes.batch(step) for step in range(1, 21)] == [n for n in range(40) if n not in gone][:20]


class Broken:
    """The objective, whose loss is multiplied by `factor` in the rows of some batches of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: list[int], factor: float = math.nan) -> None:
        from ropewalk.train import loop

        self.sound, self.factor = loop.loss_sum, factor
        monkeypatch.setattr(loop, "loss_sum", self)
        known = Loader.batch

        def batch(loader: Loader, first: int, rows: int | None = None) -> Any:
            found = known(loader, first, rows)
            if first // ROWS not in batches or rows != ROWS:  # the loop's, not the validation's
                return found
            named = tuple(tuple(f"bad {name}" for name in row) for row in found.documents)
            return replace(found, documents=named)

        monkeypatch.setattr(Loader, "batch", batch)

    def __call__(self, model: Any, batch: Any, chunk: int) -> torch.Tensor:
        loss = self.sound(model, batch, chunk)
        return loss * self.factor if batch.documents[0][0].startswith("bad ") else loss


def train(recipe: dict[str, Any], runs: Path | None = None) -> Path:
    return rw.train(recipe if runs is None else recipe | {"runs": str(runs)}, progress=False).run


def only_run(recipe: dict[str, Any]) -> Path:
    (run,) = Path(recipe["runs"]).iterdir()
    return run


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "state" / "tensors.safetensors")


def position(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state" / "state.json").read_text())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], prefix: str = "") -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]) or not name.startswith(prefix), name


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics-train.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


LORA = {"method": "lora", "rank": 4, "dropout": 0.2}
SPIKE = {"window": 4, "threshold": 30.0}


def test_by_default_a_spike_is_only_recorded(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, [4], factor=50.0)
    run = train(make_recipe(spike=SPIKE))
    found = records(run, "train")
    assert [record["step"] for record in found if "spike" in record] == [5]
    assert len(found) == 6
    assert "| spikes | step 5" in (run / "report.md").read_text()


@pytest.mark.parametrize(("factor", "said"), [(math.nan, "loss is nan"), (50.0, "robust deviations above")])
def test_stop_names_the_documents_and_changes_nothing(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, factor: float, said: str
) -> None:
    recipe = make_recipe(spike=SPIKE | {"policy": "stop"}, checkpoint_every=1)
    Broken(monkeypatch, [4], factor)
    with pytest.raises(RopewalkError, match=f"step 5: .*{said}.*stopped before the update") as caught:
        train(recipe)
    assert "it came with documents bad corpus.jsonl:" in str(caught.value)
    assert position(only_run(recipe), 4)["step"] == 4
    monkeypatch.undo()
    assert rw.resume(only_run(recipe), progress=False).step == 6


@pytest.mark.parametrize(
    ("factor", "adapt"), [(math.nan, {}), (50.0, {}), (math.inf, LORA)], ids=["nan", "finite", "inf-lora"]
)
def test_skip_drops_the_update_and_nothing_else(
    make_recipe: Make, trace: Trace, monkeypatch: pytest.MonkeyPatch, factor: float, adapt: dict[str, Any]
) -> None:
    """Weights, states and their counters are those of the step before; the data goes on."""
    Broken(monkeypatch, [4], factor)
    recipe = make_recipe(spike=SPIKE | {"policy": "skip"}, checkpoint_every=1, keep=9, adapt=adapt)
    run = train(recipe)
    before, after = state(run, 4), state(run, 5)
    before.pop("random.cpu")
    after.pop("random.cpu")  # dropout drew in the skipped step
    assert_same(before, after)
    later = state(run, 6)
    assert any(not torch.equal(tensor, later[name]) for name, tensor in before.items())
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 6]
    (skip,) = records(run, "skip")
    assert (skip["step"], skip["batch"]) == (5, 4)
    assert skip["loss"] is None or factor == 50.0
    assert position(run, 6)["spikes"]["skipped"] == [5]
    assert position(run, 6)["loader"]["samples_seen"] == 6 * ROWS
    assert "| skipped steps | 5 |" in (run / "report.md").read_text()
    assert json.loads((run / "metrics-train.jsonl").read_text().splitlines()[-1])  # no NaN in JSON
    assert "NaN" not in (run / "metrics-train.jsonl").read_text()


def test_too_many_skipped_steps_stop_the_run(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, [1, 2, 3])
    with pytest.raises(RopewalkError, match=r"step 4: the loss is nan.*train\.spike\.limit \(2\) is reached"):
        train(make_recipe(spike={"policy": "skip", "limit": 2}))


def test_a_run_that_stopped_goes_on_with_another_policy(
    make_recipe: Make, trace: Trace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Broken(monkeypatch, [3])
    recipe = make_recipe(checkpoint_every=2)
    with pytest.raises(RopewalkError, match="step 4"):
        train(recipe)
    run = only_run(recipe)
    with pytest.raises(RopewalkError, match="step 4"):
        rw.resume(run, progress=False)
    assert rw.resume(run, ["train.spike.policy=skip"], progress=False).step == 6
    assert trace(run) == trace(train(make_recipe(spike={"policy": "skip"}), tmp_path / "whole"))


def never_had(monkeypatch: pytest.MonkeyPatch, gone: list[int]) -> None:
    """The loader of a data order in which some batches are not."""
    known = Loader.batch

    def batch(loader: Loader, first: int, rows: int | None = None) -> Any:
        if rows != ROWS:
            return known(loader, first, rows)
        return known(loader, [n for n in range(99) if n not in gone][first // ROWS] * ROWS, rows)

    monkeypatch.setattr(Loader, "batch", batch)


@pytest.mark.parametrize(
    ("case", "every", "leave_out", "gone"),
    [
        ("full", 0, 1, [4]),
        ("full", 3, 2, [3, 4]),
        ("lora-bfloat16", 0, 1, [4]),
        ("lora-bfloat16", 2, 3, [4]),
    ],
)
def test_after_a_rollback_it_is_the_run_that_never_had_the_samples(
    make_recipe: Make,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    case: str,
    every: int,
    leave_out: int,
    gone: list[int],
) -> None:
    """Bit for bit: losses, weights, optimizer, generators. `every` 0: back to the beginning."""
    fields: dict[str, Any] = {"steps": 8, "micro_batch_size": 4, "checkpoint_every": every, "keep": 9}
    if case == "lora-bfloat16":
        fields |= {"precision": "bfloat16", "adapt": LORA}
    spike = SPIKE | {"policy": "rollback", "leave_out": leave_out}
    with monkeypatch.context() as patch:
        Broken(patch, [4])
        run = train(make_recipe(evaluate_every=3, spike=spike, **fields))
    with monkeypatch.context() as patch:
        never_had(patch, gone)
        reference = train(make_recipe(evaluate_every=3, **fields), tmp_path / "reference")
    assert trace(run) == trace(reference)
    assert_same(state(run, 8), state(reference, 8))
    (record,) = records(run, "rollback")
    assert (record["step"], record["from"], record["batch"]) == (4 if every == 2 else every, 5, 4)
    assert record["left_out"] == [gone]
    assert position(run, 8)["spikes"]["left_out"] == [gone]
    assert position(run, 8)["loader"]["samples_seen"] == (8 + len(gone)) * ROWS
    report = (run / "report.md").read_text()
    assert "| rollbacks | step 5 to step" in report
    assert ("steps done twice" in report) == (record["step"] < 4)


def test_rollbacks_are_bounded_and_say_so(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    Broken(monkeypatch, [3, 4, 5])
    recipe = make_recipe(spike={"policy": "rollback", "limit": 2}, checkpoint_every=2)
    with pytest.raises(RopewalkError, match=r"step 4: the loss is nan.*limit \(2\) is reached"):
        train(recipe)
    assert [record["left_out"] for record in records(only_run(recipe), "rollback")] == [[[3]], [[3], [4]]]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_resumed_equals_uninterrupted_with_spikes_in_between(
    make_recipe: Make, trace: Trace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str
) -> None:
    """From every checkpoint; also where the rollback is younger than the checkpoint that it went back to."""
    Broken(monkeypatch, [3, 6])
    fields = {"steps": 9, "checkpoint_every": 2, "micro_batch_size": 4, "keep": 9, "adapt": LORA}
    run = train(make_recipe(spike=SPIKE | {"policy": policy}, **fields))
    assert len(records(run, policy)) == 2
    for step in (2, 4, 6, 8):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(run, copy)
        (copy / "report.md").unlink()
        for checkpoint in (copy / "checkpoints").iterdir():
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        rw.resume(copy, progress=False)
        assert trace(copy) == trace(run)
        assert_same(state(copy, 9), state(run, 9))
        assert position(copy, 9)["spikes"] == position(run, 9)["spikes"]
        kept = [{**record, "time": 0, "seconds": 0} for record in records(copy, policy)]
        assert kept == [{**record, "time": 0, "seconds": 0} for record in records(run, policy)]


def test_a_skipped_update_and_updates_in_backward_are_refused(make_recipe: Make) -> None:
    recipe = make_recipe(
        micro_batch_size=4, clip=0, optimizer={"in_backward": True}, spike={"policy": "skip"}
    )
    with pytest.raises(UserError, match=r"train\.spike\.policy: skip drops.*set it to rollback"):
        train(recipe)


def test_updates_in_backward_can_be_rolled_back(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A finite spike, with which some weights have been updated already."""
    fields = {"steps": 8, "micro_batch_size": 4, "clip": 0, "checkpoint_every": 2}
    fields |= {"optimizer": {"in_backward": True}}
    with monkeypatch.context() as patch:
        Broken(patch, [4], 50.0)
        run = train(make_recipe(spike=SPIKE | {"policy": "rollback"}, **fields))
    with monkeypatch.context() as patch:
        never_had(patch, [4])
        reference = train(make_recipe(**fields), tmp_path / "reference")
    assert len(records(run, "rollback")) == 1
    assert_same(state(run, 8), state(reference, 8))
