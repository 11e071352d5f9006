"""Some documents of a view: found by a text, an expression, a rule or a name, with what is known of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ropewalk.clean.rules import columns_of
from ropewalk.clean.words import mix
from ropewalk.data.cleaning import evaluate
from ropewalk.data.edits import Edit, edited
from ropewalk.data.records import BadRow, Record
from ropewalk.data.tokenize import Tokenization
from ropewalk.data.verdicts import Verdicts
from ropewalk.data.view import View
from ropewalk.errors import UserError
from ropewalk.look.samples import Place, reasons

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around what a pattern found: of Unicode's private use, which a text that has them is not marked for."""


@dataclass(frozen=True)
class Question:
    """Which documents are looked for; what is not asked is not looked at.

    `search`: a text, or /a regular expression/; `where`: SQL over what is known of a document; `rule`: those
    that this rule drops; `without`: those that would be kept but for this rule; `fate`: kept or dropped.
    """

    search: str | None = None
    where: str | None = None
    rule: str | None = None
    without: str | None = None
    fate: Literal["kept", "dropped"] | None = None
    id: str | None = None


def look(view: View, question: Question, count: int = 5, seed: int = 0) -> dict[str, Any]:
    """{matching: how many, documents: `count` of them}; which ones depends on content and seed alone.

    Each is {id, source, verdict, failed, kept, values of what was asked about, text, marks in it, part, row}.
    Raises UserError for a rule or a column that is not there, and an expression that is none.
    """
    rules = [rule["rule"] for rule in view.rules]
    for asked, option in ((question.rule, "--rule"), (question.without, "--without")):
        if asked is not None and asked not in rules:
            raise UserError(
                f"{option} {asked}: there is no such rule; there are {', '.join(rules) or 'none'}"
            )
    columns = _columns(view, question)
    found: list[tuple[int, int, int]] = []
    matching = 0
    for i in range(len(view.parts)):
        rows = np.flatnonzero(_asked(view, i, question))
        if question.search is not None:
            rows = _searched(view, i, rows, question.search)
        matching += len(rows)
        if len(rows):
            hashes = view.table(i, ["hash"])["hash"].to_numpy()[rows]
            order = mix(hashes ^ mix(np.array([seed % 2**64], np.uint64)))
            best = np.argsort(order, kind="stable")[:count]
            found += [(int(order[k]), i, int(rows[k])) for k in best]
            found = sorted(found)[:count]
    documents = [_document(view, i, row, question, columns) for _, i, row in found]
    return {"matching": matching, "of": int(view.begins[-1]), "documents": documents}


def _columns(view: View, question: Question) -> list[str]:
    """What is shown of each document."""
    asked: set[str] = set()
    if question.where is not None:
        asked = set(columns_of(question.where, "--where"))
        for name in sorted(asked - set(view.known)):
            close = get_close_matches(name, view.known, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"--where: unknown column {name}{hint} There is {', '.join(view.known)}")
    names = (question.rule, question.without)
    for rule in (rule for rule in view.rules if rule["rule"] in names):
        asked |= columns_of(rule["keeps"])
    if question.id is not None:
        asked |= {*view.attributes} & {*view.known}
    return [name for name in view.known if name in asked]


def _asked(view: View, i: int, question: Question) -> np.ndarray:
    """[documents of part i] bool: all but the search."""
    result = np.ones(view.sizes[i], bool)
    names = {"id": "id", "rule": "verdict", "without": "failed", "fate": "kept"}
    asked = {name: column for name, column in names.items() if getattr(question, name) is not None}
    if asked:
        table = view.table(i, [*asked.values()])
        if question.id is not None:
            result &= _true(pc.equal(table["id"], question.id))
        if question.rule is not None:
            result &= _true(pc.equal(table["verdict"], question.rule))
        if question.without is not None:
            alone = [failed == [question.without] for failed in table["failed"].to_pylist()]
            result &= np.array(alone, bool)
        if question.fate is not None:
            result &= _true(table["kept"]) == (question.fate == "kept")
    if question.where is not None and result.any():
        columns = sorted(columns_of(question.where)) or ["hash"]
        (values,) = evaluate(view.table(i, columns), {"--where": question.where}, "BOOLEAN")
        result &= _true(values)
    return result


def _true(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)


def _searched(view: View, i: int, rows: np.ndarray, search: str) -> np.ndarray:
    wanted = set(rows.tolist())
    found, begin = [], 0
    for records in view.parts[i].read().batches() if wanted else ():
        here = [row for row in range(begin, begin + len(records)) if row in wanted]
        texts = pa.array([records[row - begin].plain for row in here], pa.large_string())
        found += [here[k] for k in np.flatnonzero(_matches(texts, search))]
        begin += len(records)
    return np.array(found, np.int64)


def _expression(search: str) -> str | None:
    return search[1:-1] if len(search) > 2 and search[0] == search[-1] == "/" else None


def _matches(texts: pa.Array, search: str) -> np.ndarray:
    """By RE2, whose time grows with the text alone, whatever the expression."""
    expression = _expression(search)
    try:
        if expression is None:
            return _true(pc.match_substring(texts, search))
        return _true(pc.match_substring_regex(texts, expression))
    except pa.ArrowInvalid as error:
        raise UserError(f"--search {search}: {error}") from None


def places_of(text: str, search: str) -> list[Place]:
    """Characters in a text where it is found."""
    expression, array = _expression(search), pa.array([text], pa.large_string())
    if _OPEN in text or _CLOSE in text:
        return []
    if expression is None:
        marked = text.replace(search, f"{_OPEN}{search}{_CLOSE}")
    else:
        marked = pc.replace_substring_regex(array, expression, f"{_OPEN}\\0{_CLOSE}")[0].as_py()
    first, *rest = marked.split(_OPEN)
    places, at = [], len(first)
    for piece in rest:
        inside, _, after = piece.partition(_CLOSE)
        if inside:
            places.append((at, at + len(inside)))
        at += len(inside) + len(after)
    return places


def _document(view: View, i: int, row: int, question: Question, columns: Sequence[str]) -> dict[str, Any]:
    known = (
        view.table(i, ["verdict", "failed", "duplicate_of", "kept", *columns]).slice(row, 1).to_pylist()[0]
    )
    record = record_at(view, i, row)
    values = view.named({name: known[name] for name in columns})
    text = record.plain
    marks = reasons(text, columns, values) if question.where is None else []
    if question.search is not None:
        marks = places_of(text, question.search)
    return {
        "id": record.id,
        "source": record.source,
        **{name: known[name] for name in ("kept", "verdict", "failed", "duplicate_of")},
        "reason": next((rule["reason"] for rule in view.rules if rule["rule"] == known["verdict"]), None),
        "keeps": next((rule["keeps"] for rule in view.rules if rule["rule"] == known["verdict"]), None),
        "values": values,
        "text": text,
        "marks": [list(mark) for mark in marks],
        "part": i,
        "row": row,
    }


def record_at(view: View, i: int, row: int) -> Record:
    return view.parts[i].read().at(np.array([row]))[0]


def tokens_of(
    view: View, i: int, row: int, tokenizer: Any, tokenization: Tokenization
) -> Iterator[tuple[str, bool, bool]]:
    """(text, scored, special) of each token of a document, as it would be trained on; not cut into rows.

    A character of several tokens is the text of the last of them.
    """
    record, edits = record_at(view, i, row), []
    path = view.parts[i].verdicts
    if path is not None:
        listed = Verdicts.read(path).table["edits"][row].as_py()
        edits = [Edit(**edit) for edit in listed or ()]
    changed = edited(record, edits)
    (tokens,) = tokenization([changed.record], [changed.unscored] if changed.unscored else None)
    if isinstance(tokens, BadRow):
        raise UserError(str(tokens))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    part: list[int] = []
    for id, scored in zip(tokens.ids.tolist(), tokens.scored.tolist(), strict=True):
        part.append(id)
        text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(part) < 4:  # bytes of UTF-8 that more are to come for
            text = ""
        else:
            part = []
        yield text, scored, id in special


def judgement(view: View) -> dict[str, Any]:
    """{documents, kept, rules, sources}: what the rules of a view drop, JSON-able."""
    sources: dict[str, dict[str, int]] = {}
    for i, part in enumerate(view.parts):
        counts = sources.setdefault(part.source, {"documents": 0, "kept": 0})
        counts["documents"] += view.sizes[i]
        counts["kept"] += int(pc.sum(view.table(i, ["kept"])["kept"]).as_py() or 0)
    totals = {name: sum(n[name] for n in sources.values()) for name in ("documents", "kept")}
    return {**totals, "rules": [*view.rules], "sources": sources}
