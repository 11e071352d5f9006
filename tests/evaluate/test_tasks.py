"""Prompts are built as said, shots are the same every time, and bad rows name their line."""

import json

import pytest

from ropewalk.errors import UserError
from ropewalk.evaluate import tasks
from ropewalk.evaluate.tasks import build_prompt, choose_shots, read_examples, run_task
from ropewalk.serve import Completion


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    return _write(tmp_path / "test.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)])


@pytest.fixture
def shots(tmp_path):
    return _write(
        tmp_path / "shots.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3, 13)]
    )


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def test_chat_prompts_have_shots_as_turns_before_and_the_instruction_before_every_prompt(pairs, shots):
    examples = read_examples(pairs)
    worked = choose_shots(examples, 2, shots, "t")
    assert build_prompt(examples[0], worked, "Do it.", chat=True) == [
        _user("Do it.\n\nq5"),
        _assistant("a5"),
        _user("Do it.\n\nq9"),
        _assistant("a9"),
        _user("Do it.\n\nq0"),
    ]
    assert build_prompt(examples[0], [], None, chat=True) == [_user("q0")]


def test_plain_prompts_are_text_with_blank_lines_between(pairs, shots):
    examples = read_examples(pairs)
    worked = choose_shots(examples, 2, shots, "t")
    assert build_prompt(examples[1], worked, "Say:\n", chat=False) == "Say:\nq5a5\n\nSay:\nq9a9\n\nSay:\nq1"


def test_a_conversation_keeps_its_system_message_and_its_turns(tmp_path):
    system = {"role": "system", "content": "s"}
    turns = [system, _user("one"), _assistant("1"), _user("two"), _assistant("2")]
    other = [{"role": "system", "content": "t"}, _user("three"), _assistant("3")]
    path = _write(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": other}])
    example, shot = read_examples(path)
    assert (example.prompt, example.reference) == ("two", "2")
    expected = [system, _user("I three"), _assistant("3"), _user("one"), _assistant("1"), _user("I two")]
    assert build_prompt(example, [shot], "I ", chat=True) == expected
    assert build_prompt(example, [shot], None, chat=False) == "t\nthree\n3\n\ns\none\n1\ntwo\n"


def test_shots_are_never_rows_that_are_tested_and_always_the_same(pairs, shots):
    examples = read_examples(pairs)
    chosen = choose_shots(examples, 8, shots, "t")
    assert [shot.prompt for shot in chosen] == [f"q{i}" for i in range(5, 13)]
    with pytest.raises(UserError, match=r"shots.jsonl: 8 rows that task t does not test; shots asks for 9"):
        choose_shots(examples, 9, shots, "t")
    with pytest.raises(UserError, match="task t: shots is 1; shots_path must say"):
        choose_shots(examples, 1, None, "t")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "a task needs messages, or prompt and completion"),
        ({"messages": [_user("a")]}, "must be a question and the assistant's answer"),
        ({"messages": [_assistant("a")]}, "must be a question"),
        ({"messages": [_user("a"), _assistant("b"), _assistant("c")]}, "must be a question"),
        ({"messages": [_user("a"), {"role": "assistant", "tool_calls": []}]}, "no content"),
        ({"messages": "a"}, "messages"),
        ({"prompt": 3, "completion": "x"}, "prompt must be text"),
    ],
)
def test_a_bad_row_names_its_line(tmp_path, row, message):
    good = {key: "x" for key in row}
    if "messages" in row:
        good["messages"] = [_user("a"), _assistant("b")]
    path = (
        _write(tmp_path / "a.jsonl", [good, row])
        if "text" not in row
        else _write(tmp_path / "a.jsonl", [row])
    )
    line = 1 if "text" in row else 2
    with pytest.raises(UserError, match=rf"a\.jsonl:{line}: .*{message}"):
        read_examples(path)


class _Tokenizer:
    chat_template = "x"


def test_a_task_scores_rows_and_corpus_and_counts_progress(pairs, monkeypatch):
    asked = {}

    def answer(model, tokenizer, prompts, *, on_token, **options):
        asked.update(options, prompts=prompts)
        for i in reversed(range(len(prompts))):
            on_token(i, "piece", False)
            on_token(i, "", True)
        return [Completion(f" {p[-1]['content'].replace('q', 'a')}\n", [1], "stop", 1) for p in prompts]

    monkeypatch.setattr(tasks, "generate", answer)
    told = []
    result = run_task(
        None,
        _Tokenizer(),
        name="t",
        path=pairs,
        metrics=("exact_match", "rouge_l"),
        limit=3,
        max_new_tokens=7,
        stop=("\n",),
        batch_size=2,
        progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (asked["max_new_tokens"], asked["stop"], asked["batch_size"], len(asked["prompts"])) == (
        7,
        ("\n",),
        2,
        3,
    )
    assert result.scores == {"exact_match": 100.0, "rouge_l": 100.0}
    assert result.rows[1] == {
        "prompt": "q1",
        "answer": "a1",
        "reference": "a1",
        "scores": {"exact_match": 100.0, "rouge_l": 100.0},
    }


def test_a_missing_extra_is_said_before_the_work(pairs, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(tasks, "generate", lambda *a, **k: pytest.fail("worked first"))
    with pytest.raises(UserError, match="sacrebleu"):
        run_task(None, _Tokenizer(), name="t", path=pairs, metrics=("chrf",))


def test_an_empty_task_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no rows; task t"):
        run_task(None, _Tokenizer(), name="t", path=path)
