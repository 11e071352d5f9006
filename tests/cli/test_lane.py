"""How the lane compares base and tuned: fair to the base, honest about what is missing."""

import pytest

from ropewalk.evaluate import Evaluation, Sample, TaskResult
from ropewalk.lane import LaneResult, compare, markdown, side_by_side


def task(name: str, shots: int, scores: dict[str, float], prompts="abcdefghij") -> TaskResult:
    rows = [{"prompt": p, "answer": f"{name} {p}", "reference": p.upper(), "scores": {}} for p in prompts]
    return TaskResult(name, shots, scores, rows)


def evaluation(*tasks: TaskResult, panel=()) -> Evaluation:
    return Evaluation("e", "source", {}, list(tasks), list(panel), 1.0)


ZERO = task("zero", 0, {"chrf": 20.0, "exact_match": 3.0})
FEW = task("few", 4, {"chrf": 30.0, "exact_match": 1.0})
TUNED = task("docstrings", 0, {"chrf": 40.0, "exact_match": 2.0})


def test_the_base_gets_its_best_prompt_for_each_metric():
    chrf, exact = compare(evaluation(ZERO, FEW), evaluation(TUNED))
    assert (chrf.base, chrf.prompt, chrf.tuned, chrf.better) == (30.0, "few, 4-shot", 40.0, True)
    assert (exact.base, exact.prompt, exact.tuned, exact.better) == (3.0, "zero", 2.0, False)


def test_only_the_same_questions_are_compared():
    other = task("other", 0, {"chrf": 99.0}, prompts="xyz")
    assert compare(evaluation(other, FEW), evaluation(TUNED))[0].base == 30.0
    fewer = task("fewer", 0, {"chrf": 99.0}, prompts="abc")
    assert compare(evaluation(fewer), evaluation(TUNED))[0].base is None


def test_a_model_from_scratch_has_no_base():
    found = compare(None, evaluation(TUNED))
    assert [row.base for row in found] == [None, None]
    assert [row.better for row in found] == [None, None]
    assert all(sample.base is None for sample in side_by_side(None, evaluation(TUNED)))


def test_five_samples_spread_over_the_task_beside_the_best_base_prompt():
    samples = side_by_side(evaluation(ZERO, FEW), evaluation(TUNED))
    assert [s.prompt for s in samples] == ["a", "c", "e", "g", "i"]
    assert (samples[1].reference, samples[1].base, samples[1].tuned) == ("C", "few c", "docstrings c")


def test_fewer_rows_give_fewer_samples():
    assert len(side_by_side(None, evaluation(task("t", 0, {"chrf": 1.0}, prompts="ab")))) == 2


def test_without_tasks_the_panel_is_shown():
    before, after = [Sample("q", "old")], [Sample("q", "new"), Sample("r", "other")]
    first, second = side_by_side(evaluation(panel=before), evaluation(panel=after))
    assert (first.base, first.tuned, first.reference) == ("old", "new", None)
    assert second.base is None


@pytest.mark.parametrize("prompt", ["def f():\n    pass", "```python\nx\n```"])
def test_the_report_quotes_prompts_whole(tmp_path, prompt):
    base = evaluation(task("zero", 0, {"chrf": 20.0}, prompts=[prompt]))
    tuned = evaluation(task("t", 0, {"chrf": 21.0}, prompts=[prompt]))
    text = markdown(
        LaneResult(tmp_path, False, compare(base, tuned), side_by_side(base, tuned), {"train": 2.0})
    )
    assert "| chrf | t (1 rows) | 20.00 | zero | 21.00 |" in text
    assert prompt in text
    fence = next(line for line in text.splitlines() if line.startswith("```"))
    assert fence.removesuffix("text") not in prompt


def test_an_interrupted_training_ends_the_lane_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from ropewalk.cli import main

    recipe = tmp_path / "x.yaml"
    recipe.write_text("{name: x, model: {source: m}, data: {train: [{path: p}]}, train: {steps: 5}}")
    stopped = SimpleNamespace(run=tmp_path / "run", interrupted=True)
    monkeypatch.setattr("ropewalk.lane.prepare", lambda *a, **k: None)
    monkeypatch.setattr("ropewalk.lane.train", lambda *a, **k: stopped)
    assert main(["run", str(recipe)]) == 130
    out = capsys.readouterr().out
    assert f"ropewalk resume {tmp_path / 'run'}" in out
    assert "talk to it" not in out
