"""Evaluation sets, read as questions with answers: what training data must not hold.

A set is a file that a task could be (JSONL, JSON, CSV, Parquet, or text files as whole documents), or a task
of the Language Model Evaluation Harness, by name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.clean.contamination import EvaluationItem
from ropewalk.data.readers import Source, files_of, read_rows, survey
from ropewalk.data.records import messages_of
from ropewalk.errors import RopewalkError, UserError

HARNESS = "lm-eval:"
QUESTION = ("question", "prompt", "problem", "instruction", "query", "ctx", "goal", "turns", "text")
ANSWER = tuple("answer completion output solution response target answerKey label gold".split())
CHOICES = ("choices", "options", "endings")
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class EvaluationSet:
    """`items` have the ids 0, 1, … in the order of rows. `sha256` is of the files, None without any."""

    name: str
    path: str
    sha256: str | None
    items: list[EvaluationItem]


def read_evaluation_set(path: str, name: str | None = None) -> EvaluationSet:
    """The items of a file, folder or glob, or of `lm-eval:TASK` (which needs lm-eval, and its data).

    Questions and answers are in columns of the usual names (`QUESTION`, `ANSWER`, `CHOICES`), or in messages,
    of which the last is the answer. Raises UserError that names the line of a row without a question.
    """
    if path.startswith(HARNESS):
        task = path.removeprefix(HARNESS)
        name = name or task
        rows: Iterator[tuple[str, Mapping[str, Any]]] = (
            (f"{path}:{i}", row) for i, row in enumerate(_harness(task))
        )
        return EvaluationSet(name, path, None, _items(rows, name))
    name = name or Path(path).name
    return EvaluationSet(name, path, fingerprint(path), _items(_rows(path, name), name))


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file; of several, that of theirs, in their order."""
    files = files_of(Source(str(path), Path(path).name))[0]
    hashes = [survey(file).sha256 for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _rows(path: str, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row); a document is a row with `text`."""
    for file in files_of(Source(path, name))[0]:
        for where, row in read_rows(file):
            if isinstance(row, str):
                raise UserError(f"{where}: {row}")
            yield where, row


def _items(rows: Iterator[tuple[str, Mapping[str, Any]]], name: str) -> list[EvaluationItem]:
    items = [item_from_row(row, name, str(i), where) for i, (where, row) in enumerate(rows)]
    if not items:
        raise UserError(f"evaluation set {name}: has no rows")
    return items


def item_from_row(row: Mapping[str, Any], name: str, id: str, where: str) -> EvaluationItem:
    """Raises UserError that names `where` and the row's columns when there is no question among them."""
    if row.get("messages"):
        return _from_messages(row["messages"], name, id, where)
    column = next((c for c in QUESTION if row.get(c)), None)
    if column is None:
        raise UserError(
            f"{where}: no question; an evaluation set has messages, or a column named one of "
            f"{', '.join(QUESTION)}; there is {', '.join(map(str, row)) or 'nothing'}"
        )
    question = _text(row[column], where, column)
    if column == "instruction" and row.get("input"):
        question = f"{question}\n{row['input']}"
    choices = _choices(row)
    known = [row[c] for c in ANSWER if c != column and row.get(c) is not None]
    answer = None if not known else _answer(known[0], choices, row)
    return EvaluationItem(name, id, question, answer, choices)


def _from_messages(messages: Any, name: str, id: str, where: str) -> EvaluationItem:
    try:
        turns = [m for m in messages_of(messages) if m["role"] != "system" and "content" in m]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    answer = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns:
        raise UserError(f"{where}: messages have no question")
    return EvaluationItem(name, id, "\n".join(turn["content"] for turn in turns), answer)


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} must be text, is {json.dumps(value, default=str)[:60]}")
    return value


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = next((row[c] for c in CHOICES if row.get(c)), None)
    if isinstance(value, Mapping):  # ARC: {"text": [...], "label": [...]}; others: {"A": ..., "B": ...}
        value = value.get("text", list(value.values()))
    if value is None and all(isinstance(row.get(letter), str) for letter in _LETTERS[:4]):
        value = [row[letter] for letter in _LETTERS[:4]]
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _answer(value: Any, choices: Sequence[str], row: Mapping[str, Any]) -> str:
    """In words: of choices, the one that a letter, a label or a number from 0 points to."""
    if isinstance(value, list) and value:
        value = value[0]
    said = str(value)
    if not choices or said in choices:
        return said
    offered = row.get("choices")
    labels = offered.get("label") if isinstance(offered, Mapping) else None
    if isinstance(labels, list | tuple) and said in labels:
        place = labels.index(said)
    elif said.isascii() and said.isdigit():
        place = int(said)
    else:
        place = _LETTERS.find(said.strip()) if len(said.strip()) == 1 else -1
    return choices[place] if 0 <= place < len(choices) else said


def _harness(name: str) -> list[dict[str, Any]]:
    """The test (else validation) rows of a task or group of lm-eval; all that it names, in its order."""
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise UserError(
            f"{HARNESS}{name}: needs lm-eval: pip install lm-eval, or give the set as a file"
        ) from error
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise UserError(f"{HARNESS}{name}: lm-eval has no task of this name")
    try:
        tasks = list(_flat(get_task_dict([name], manager)))
        return [_harness_row(task, row) for task in tasks for row in task.eval_docs]
    except Exception as error:  # its tasks are code of many authors, and most data comes by network
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise RopewalkError(
            f"{HARNESS}{name}: lm-eval could not load the task's data ({said}); it usually needs a network: "
            "give the set as a file instead"
        ) from error


def _flat(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield task


def _harness_row(task: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with what the task asks and expects of it where its columns have names of their own."""
    if any(row.get(column) for column in QUESTION):
        return dict(row)
    return {"question": str(task.doc_to_text(row)), "answer": str(task.doc_to_target(row))}
