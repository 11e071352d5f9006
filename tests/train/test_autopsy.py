"""`ropewalk spike`: the documents of a step by their own losses; the one that is garbage comes first."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.train import Autopsy

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def garbage(tmp_path: Path, corpus: Path) -> Path:
    """The corpus, and in line 31 letters that no other document has."""
    lines = corpus.read_text().splitlines()
    letters = random.Random(1)
    text = "".join(chr(letters.randint(0x3400, 0x4DB0)) for _ in range(15))
    lines.insert(30, json.dumps({"text": text}))
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def with_garbage(run: Path, steps: int) -> Autopsy:
    found = [rw.spike(run, step) for step in range(steps - 9, steps + 1)]
    mixed = [one for one in found if any(d.id == "mixed.jsonl:31" for d in one.documents)]
    return mixed[-1]


@pytest.mark.parametrize("adapt", [{}, {"method": "lora", "rank": 8}], ids=["full", "lora"])
def test_the_garbage_comes_first_and_is_marked(
    make_recipe: Make, garbage: Path, capsys: pytest.CaptureFixture[str], adapt: dict[str, Any]
) -> None:
    data = {"train": [{"path": str(garbage)}], "validation_fraction": 0}
    recipe = make_recipe(steps=40, batch_size=8, checkpoint_every=6, keep=9, data=data, adapt=adapt)
    run = rw.train(recipe, progress=False).run
    found = with_garbage(run, 40)
    first = found.documents[0]
    assert (first.id, first.outlier) == ("mixed.jsonl:31", True)
    assert sum(document.outlier for document in found.documents) < len(found.documents) / 4
    losses = [document.loss for document in found.documents if document.loss is not None]
    assert losses == sorted(losses, reverse=True)
    done = int(found.weights.removeprefix("step-"))
    assert done < found.step
    assert found.updates_missing == found.step - 1 - done < 6
    assert json.loads(garbage.read_text().splitlines()[30])["text"].startswith(first.text[:10])
    assert main(["spike", str(run), "--step", str(found.step)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("!")
    assert "mixed.jsonl:31" in table[2]
    assert main(["spike", str(run), "--step", str(found.step), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"][0]["id"] == "mixed.jsonl:31"


def test_the_documents_make_up_the_loss_of_the_step(make_recipe: Make) -> None:
    """With a checkpoint after every step: exactly the loss in the metrics, step by step."""
    recipe = make_recipe(steps=4, checkpoint_every=1, keep=9)
    result = rw.train(recipe, progress=False)
    for step, loss in enumerate(result.losses, 1):
        found = rw.spike(result.run, step)
        assert found.updates_missing == 0
        total = math.fsum(d.loss * d.scored_tokens for d in found.documents if d.loss is not None)
        scored = sum(document.scored_tokens for document in found.documents)
        assert total / scored == pytest.approx(loss, rel=1e-5)
    assert "the weights at the start" in rw.spike(result.run, 1).weights


def test_samples_that_a_rollback_left_out_are_found_and_numbers_that_are_not_finite_come_first(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ropewalk.train import autopsy, loop

    sound, calls = loop.loss_sum, 0

    def broken(model: Any, batch: Any, chunk: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return sound(model, batch, chunk) * (math.nan if calls == 4 else 1.0)

    recipe = make_recipe(steps=5, micro_batch_size=4, checkpoint_every=2, spike={"policy": "rollback"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss_sum", broken)
        run = rw.train(recipe, progress=False).run
    found = rw.spike(run, 4)
    assert (found.batch, found.left_out) == (3, True)
    assert (rw.spike(run, 5).batch, rw.spike(run, 5).left_out) == (5, False)
    measured = autopsy.linear_logprobs

    def nan(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        losses = measured(hidden, *arguments, **options).clone()
        losses[0] = math.nan
        return losses

    monkeypatch.setattr(autopsy, "linear_logprobs", nan)
    first = rw.spike(run, 4).documents[0]
    assert (first.loss, first.outlier) == (None, True)


def test_damaged_checkpoints_are_not_used_and_other_steps_refused(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rw.train(make_recipe(steps=4, checkpoint_every=1, keep=9), progress=False).run
    (run / "checkpoints" / "step-00000003" / "model" / "config.json").write_text("{}")
    assert rw.spike(run, 4).weights == "step-00000002"
    shutil.rmtree(run / "checkpoints")
    assert rw.spike(run, 4).updates_missing == 3
    with pytest.raises(UserError, match="--step 5: the run has the steps 1 to 4"):
        rw.spike(run, 5)
    assert main(["spike", "nowhere", "--step", "1"]) == 2
    assert "nowhere: not a run directory" in capsys.readouterr().err
