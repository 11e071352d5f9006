"""A task is scored once more on the rows that the training data do not hold, where it is known which."""

import json

import pytest
import yaml

from ropewalk.clean.contamination import Account, Contamination
from ropewalk.clean.step import Texts
from ropewalk.data.evaluation_sets import read_evaluation_set
from ropewalk.errors import UserError
from ropewalk.evaluate import clean_subset, evaluate, read_account
from ropewalk.evaluate.metrics import score_corpus

ROWS = [
    {"prompt": "What is the strongest fibre of abaca?", "completion": "Manila hemp"},
    {"prompt": "Who laid rope at Chatham?", "completion": "the dockyard"},
    {"prompt": "Why is a ropewalk long?", "completion": "so that the strands are"},
]


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def account(task, tmp_path):
    """Of training texts that hold the second row."""
    read = read_evaluation_set(str(task), "ropes")
    step = Contamination(read.items)
    texts = ["Nothing to see.", "I asked: who laid rope at Chatham? It was the dockyard."]
    found = Account(read.items, step.too_short, {"ropes": {"path": str(task), "sha256": read.sha256}})
    found.add(step.map(Texts(texts)), texts, ["a", "b"])
    path = tmp_path / "prepared" / "contamination.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found.report()))
    return path


def test_scores_are_those_of_the_rows_that_are_left():
    rows = [{"answer": a, "reference": r} for a, r in (("x", "x"), ("y", "z"), ("u v", "u w"), ("k", "k"))]
    subset = clean_subset(["exact_match", "chrf"], rows, frozenset({0, 3, 9}))
    expected = score_corpus(["exact_match", "chrf"], ["y", "u v"], ["z", "u w"])
    assert subset.scores == {f"{name}_clean": score for name, score in expected.items()}
    assert (subset.rows, subset.contaminated) == (2, [0, 3])
    nothing = clean_subset(["exact_match"], rows[:1], frozenset({0}))
    assert (nothing.scores, nothing.rows) == ({}, 0)


def recipe(tiny_llama_dir, task):
    return {
        "name": "tiny",
        "model": {"source": str(tiny_llama_dir)},
        "data": {"train": [{"path": str(task)}], "sequence_length": 64},
        "train": {"steps": 1, "precision": "float32", "device": "cpu"},
        "evaluate": {
            "tasks": [{"name": "ropes", "path": str(task), "max_new_tokens": 4, "metrics": ["rouge_l"]}]
        },
    }


def test_a_task_that_the_account_knows_has_both_scores_in_report_and_json(tiny_llama_dir, task, account):
    result = evaluate(recipe=recipe(tiny_llama_dir, task), contamination=account)
    (ropes,) = result.as_dict()["tasks"]
    assert (ropes["clean"]["rows"], ropes["clean"]["contaminated"]) == (2, [1])
    assert set(ropes["clean"]["scores"]) == {"rouge_l_clean"}
    assert "| rouge_l_clean | ropes (2 of 3 rows not in the training data) |" in result.table()
    without = evaluate(recipe=recipe(tiny_llama_dir, task)).as_dict()["tasks"][0]
    assert without == {key: value for key, value in ropes.items() if key != "clean"}


def test_a_file_that_has_changed_is_not_the_one_that_was_looked_for(tiny_llama_dir, task, account):
    task.write_text(task.read_text() + "\n")
    result = evaluate(recipe=recipe(tiny_llama_dir, task), contamination=account)
    assert result.tasks[0].clean is None


def test_a_run_is_measured_with_the_account_of_its_own_data(tiny_llama_dir, task, account, tmp_path):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_llama_dir, task)))
    (run / "lineage.json").write_text(json.dumps({"data": {"directory": str(account.parent)}}))
    from ropewalk.model import load_model, load_tokenizer

    loaded = (load_model(tiny_llama_dir), load_tokenizer(tiny_llama_dir))
    assert evaluate(run, loaded=loaded).tasks[0].clean.contaminated == [1]
    account.unlink()
    assert evaluate(run, loaded=loaded, overwrite=True).tasks[0].clean is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object"),
        ("{}", "not an account of contamination"),
        ('{"sets": {"a": {}}}', "set a does not say which items"),
        ('{"sets": {"a": {"sha256": "x", "contaminated": ["b"]}}}', "set a: contaminated must be numbers"),
    ],
)
def test_what_is_no_account_is_said_before_a_model_is_loaded(
    tiny_llama_dir, task, tmp_path, monkeypatch, content, message
):
    monkeypatch.setattr("ropewalk.evaluate.entry.load_model", lambda *a, **k: pytest.fail("loaded"))
    path = tmp_path / "account.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_account(path)
    with pytest.raises(UserError, match=message):
        evaluate(recipe=recipe(tiny_llama_dir, task), contamination=path)
