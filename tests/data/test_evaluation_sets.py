"""Evaluation sets in the shapes in which they are published become questions, answers and choices."""

import csv
import hashlib
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ropewalk.clean.contamination import EvaluationItem
from ropewalk.data.evaluation_sets import fingerprint, item_from_row, read_evaluation_set
from ropewalk.errors import RopewalkError, UserError
from ropewalk.evaluate.tasks import read_examples


def item(row):
    one = item_from_row(row, "s", "0", "here:1")
    return one.question, one.answer, one.choices


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A"}, ("Q", "A", ())),
        ({"question": "Q", "answer": "A"}, ("Q", "A", ())),
        ({"instruction": "Q", "input": "x", "output": "A"}, ("Q\nx", "A", ())),
        ({"instruction": "Q", "input": "", "output": "A"}, ("Q", "A", ())),
        ({"text": "a document"}, ("a document", None, ())),
        ({"turns": ["first", "second"]}, ("first\nsecond", None, ())),
        ({"question": "Q", "choices": ["x", "y"], "answer": 1}, ("Q", "y", ("x", "y"))),
        ({"question": "Q", "choices": ["x", "y"], "answer": "A"}, ("Q", "x", ("x", "y"))),
        ({"question": "Q", "choices": ["7", "1"], "answer": "1"}, ("Q", "1", ("7", "1"))),
        (
            {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            ("Q", "y", ("x", "y")),
        ),
        (
            {"question": "Q", "choices": {"text": ["x", "y"], "label": None}, "answer": "B"},
            ("Q", "y", ("x", "y")),
        ),
        ({"ctx": "Q", "endings": ["x", "y"], "label": "0"}, ("Q", "x", ("x", "y"))),
        (
            {"question": "Q", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"},
            ("Q", "z", ("x", "y", "z", "w")),
        ),
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                          {"role": "assistant", "content": "A"}]},
            ("Q", "A", ()),
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, ("Q", None, ())),
    ],
)  # fmt: skip
def test_the_usual_shapes_of_rows(row, expected):
    assert item(row) == expected


def test_files_of_every_kind_give_the_same_items_numbered_like_a_tasks_rows(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    expected = [EvaluationItem("s", str(i), f"question {i}", f"answer {i}") for i in range(3)]
    for kind in ("jsonl", "json", "parquet", "csv"):
        path = tmp_path / f"a.{kind}"
        read = read_evaluation_set(str(path), "s")
        assert read.items == expected
        assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint(path)
        assert [one.prompt for one in read_examples(path)] == [one.question for one in read.items]


def test_text_files_are_whole_documents_and_several_files_one_set(tmp_path):
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "a.txt").write_text("alpha")
    read = read_evaluation_set(str(tmp_path))
    assert [(one.id, one.question) for one in read.items] == [("0", "alpha"), ("1", "beta")]
    before = fingerprint(tmp_path)
    (tmp_path / "b.txt").write_text("gamma")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Q"}\n{"riddle": "Q"}', r"s.jsonl:2: no question; .*there is riddle"),
        ('{"question": 3}', r"s.jsonl:1: question must be text, is 3"),
        ("{", r"s.jsonl:1: not valid JSON"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', r"s.jsonl:1: messages\[0\].role must be one of"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"s.jsonl:1: messages have no question"),
        ("", "has no rows"),
    ],
)
def test_what_is_no_evaluation_set_is_said_with_its_line(tmp_path, content, message):
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_evaluation_set(str(path))


def harness(monkeypatch, load):
    """A module in the place of lm-eval, with the two names of it that are used."""
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["gsm8k"])
    tasks.get_task_dict = load
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)


def test_tasks_of_the_harness(monkeypatch):
    class Odd:
        eval_docs = [{"premise": "p"}]  # noqa: RUF012
        doc_to_text = staticmethod(lambda row: f"Is {row['premise']}?")
        doc_to_target = staticmethod(lambda row: "yes")

    usual = types.SimpleNamespace(eval_docs=[{"question": "Q", "answer": "A"}])
    harness(monkeypatch, lambda names, manager: {"group": {"usual": usual}, "odd": Odd})
    read = read_evaluation_set("lm-eval:gsm8k")
    assert read.sha256 is None
    assert [(one.set, one.question, one.answer) for one in read.items] == [
        ("gsm8k", "Q", "A"),
        ("gsm8k", "Is p?", "yes"),
    ]
    with pytest.raises(UserError, match="lm-eval has no task of this name"):
        read_evaluation_set("lm-eval:gsm9k")


def test_a_harness_that_is_missing_or_without_its_data_says_what_to_do(monkeypatch):
    def fail(names, manager):
        raise ConnectionError("no route to host\nand more")

    harness(monkeypatch, fail)
    with pytest.raises(
        RopewalkError, match=r"could not load the task's data \(no route to host\).*as a file"
    ):
        read_evaluation_set("lm-eval:gsm8k")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks")
    with pytest.raises(UserError, match="needs lm-eval: pip install lm-eval"):
        read_evaluation_set("lm-eval:gsm8k")
