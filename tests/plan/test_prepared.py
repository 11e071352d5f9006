"""What the planner takes from prepared data: lengths, scored tokens, and how many steps an epoch is."""

import json
from pathlib import Path

import pytest

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.plan.entry import foreseen
from ropewalk.recipe import load_recipe, resolve
from ropewalk.train.job import rows_of, total_steps


@pytest.fixture
def recipe(make_recipe, tmp_path):
    lines = [{"prompt": "What is it? " * (1 + i % 3), "completion": "rope " * (1 + i % 4)} for i in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    made = make_recipe(data={"train": [{"path": str(path)}], "sequence_length": 64})
    made["train"].pop("steps", None)
    made["train"] |= {"epochs": 1.5, "batch_size": 2}
    return made


def test_prepared_data_say_what_rows_hold_and_how_many_steps_epochs_are(recipe, tiny_tokenizer, capsys):
    before = rw.plan(recipe)
    assert before.data is None
    assert before.steps is None
    assert before.run.work.document_length is None
    prepared = rw.prepare(recipe)
    after = rw.plan(recipe)
    assert after.data is not None
    assert Path(after.data).resolve() == prepared.directory.resolve()
    resolved = resolve(load_recipe(recipe)).recipe
    loader = rows_of(resolved, prepared.train, tiny_tokenizer)
    assert after.steps == total_steps(resolved, loader)
    batch = loader.batch(0, loader.rows_per_epoch())
    scored = float((batch.labels != -100).float().mean())
    assert after.run.work.scored == pytest.approx(scored)
    assert after.run.work.document_length == pytest.approx(prepared.train.lengths.mean(), abs=0.5)
    assert after.run.step_seconds < before.run.step_seconds
    assert foreseen(resolved, 1, prepared.report)["step_seconds"] == pytest.approx(after.run.step_seconds)
    path = Path(resolved.data.directory).parent / "recipe.json"
    path.write_text(json.dumps(recipe))
    assert main(["plan", str(path)]) == 0
    assert f"data     {after.data}: documents of" in capsys.readouterr().out


def test_data_of_other_rows_or_that_is_damaged_is_not_taken(recipe):
    prepared = rw.prepare(recipe)
    assert rw.plan(recipe, ["data.sequence_length=128"]).data is None
    (prepared.directory / "prepared.json").write_text("{")
    assert rw.plan(recipe).data is None
