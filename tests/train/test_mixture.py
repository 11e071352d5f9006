"""A run on a mixture: it says what it sees how often, and resumes bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ropewalk as rw
from ropewalk.errors import UserError

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def mixed(make_recipe: Make, tmp_path: Path) -> Make:
    """A recipe on two sources, of 60 and of 6 documents, mixed half and half; documents longer than a row."""

    def make(data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
        paths = []
        for name, count in (("many", 60), ("few", 6)):
            path = tmp_path / f"{name}.jsonl"
            lines = [{"text": f"{name} {i} " + "rope walk strand " * (1 + i % 12)} for i in range(count)]
            path.write_text("\n".join(map(json.dumps, lines)))
            paths.append({"path": str(path), "weight": 1})
        settings = {"train": paths, "packing": "concat", "curriculum": "length", **(data or {})}
        return make_recipe(data=settings, **train)

    return make


def test_a_mixture_resumed_from_any_step_equals_the_uninterrupted(
    mixed: Make, copy_until: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path
) -> None:
    """Over the end of an epoch, with documents cut at the rows' ends."""
    recipe = mixed(steps=12, checkpoint_every=3, keep=9)
    whole = rw.train(recipe, progress=False)
    for step in (3, 9):
        run = copy_until(whole.run, step, tmp_path / f"from-{step}")
        assert rw.resume(run, progress=False).step == 12
        assert trace(run) == trace(whole.run)


def test_a_run_says_how_often_it_sees_each_source(mixed: Make, capfd: pytest.CaptureFixture[str]) -> None:
    result = rw.train(mixed({"curriculum": "none"}, epochs=1.0), progress=False)
    records = map(json.loads, (result.run / "metrics-train.jsonl").read_text().splitlines())
    seen = next(record for record in records if record["kind"] == "start")["sources"]
    assert seen["many.jsonl"] < 1.2
    assert seen["few.jsonl"] > 4
    report = (result.run / "report.md").read_text()
    assert f"{seen['few.jsonl']:.3g} in the run" in report
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"few.jsonl: seen {seen['few.jsonl']:.3g} times in this run" in said
    assert "many.jsonl: seen" not in said


def test_a_run_does_not_go_on_with_other_weights(
    mixed: Make, copy_until: Callable[..., Path], tmp_path: Path
) -> None:
    run = copy_until(rw.train(mixed(steps=4, checkpoint_every=2), progress=False).run, 2, tmp_path / "copy")
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    assert "weight: 1.0" in text
    recipe.write_text(text.replace("weight: 1.0", "weight: 2.5", 1))
    with pytest.raises(UserError, match="was made with other data"):
        rw.resume(run, progress=False)
