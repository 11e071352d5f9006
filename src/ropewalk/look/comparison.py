"""Two preparations of data beside each other: what only one of them trains on, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import opens, within
from ropewalk.clean.words import mix
from ropewalk.data.view import View
from ropewalk.look.samples import Wanted
from ropewalk.look.sketch import Quantiles, octaves

SAMPLES = 3
"""Documents that are shown for each reason."""
NOT_READ, CHANGED = "was not read", "has another text"
COPY, LEFT_OUT = "another copy of it is kept", "empty, too long or without scored tokens"


@dataclass(frozen=True)
class Side:
    """All documents of one preparation, [documents] each: 37 bytes a document."""

    view: View
    hashes: np.ndarray
    kept: np.ndarray
    tokens: np.ndarray
    verdict: np.ndarray
    """int32, number in `rules`, or -1"""
    rules: list[str]
    keys: np.ndarray
    """of those that are kept: equal for the same copy of the same content; of the rest 0"""

    @classmethod
    def of(cls, view: View) -> "Side":
        tables = [view.table(i, ["hash", "kept", "verdict"]) for i in range(len(view.parts))]
        table = pa.concat_tables(tables)
        hashes, kept = table["hash"].to_numpy(), table["kept"].to_numpy(zero_copy_only=False).astype(bool)
        verdict = table["verdict"].dictionary_encode().combine_chunks()
        codes = verdict.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        keys = np.zeros(len(hashes), np.uint64)
        keys[kept] = hashes[kept] + mix(_copies(hashes[kept]))
        return cls(view, hashes, kept, view.tokens, codes, verdict.dictionary.to_pylist(), keys)


def _copies(hashes: np.ndarray) -> np.ndarray:
    """[n] uint64: how many equal ones are before each."""
    order = np.argsort(hashes, kind="stable")
    result = np.empty(len(hashes), np.uint64)
    result[order] = within(np.diff(np.flatnonzero(opens(hashes[order])), append=len(hashes)))
    return result


def compare(a: View, b: View) -> dict[str, Any]:
    """An account, JSON-able, of two prepared sets of data.

    Documents are the same where their content is (by its 64-bit hash); a second copy is another document.
    """
    sides = {"a": Side.of(a), "b": Side.of(b)}
    found: dict[str, Any] = {name: _summary(side) for name, side in sides.items()}
    left, right = sides["a"], sides["b"]
    common = [np.isin(x.keys, y.keys[y.kept]) & x.kept for x, y in ((left, right), (right, left))]
    found["common"] = {
        "documents": int(common[0].sum()),
        "tokens": [int(side.tokens[same].sum()) for side, same in zip((left, right), common, strict=True)],
    }
    changed = _changed(left, right)
    found["only_a"] = _only(left, right, left.kept & ~common[0], changed[0])
    found["only_b"] = _only(right, left, right.kept & ~common[1], changed[1])
    found["rules"] = _rules(a, b)
    found["lengths"] = _lengths(left, right)
    return found


def _summary(side: Side) -> dict[str, Any]:
    view = side.view
    assert view.folder is not None
    assert view.report is not None
    sources: dict[str, dict[str, int]] = {}
    for i, part in enumerate(view.parts):
        rows = slice(*view.begins[i : i + 2].tolist())
        counts = sources.setdefault(part.source, {"documents": 0, "kept": 0, "tokens": 0})
        counts["documents"] += view.sizes[i]
        counts["kept"] += int(side.kept[rows].sum())
        counts["tokens"] += int(side.tokens[rows].sum())
    tokens = Quantiles()
    tokens.add(side.tokens[side.kept])
    return {
        "folder": str(view.folder),
        "documents": len(side.hashes),
        "kept": int(side.kept.sum()),
        "tokens": int(side.tokens.sum()),
        "scored": sum(s["scored"] for s in (view.report["train"], view.report["validation"]) if s),
        "tokens_a_document": tokens.summary(),
        "sources": sources,
    }


def _changed(a: Side, b: Side) -> list[np.ndarray]:
    """For each side [documents] bool: of this name there is another content at the other side. Holds the
    names of those whose content is at one side only."""
    alone = [~np.isin(x.hashes, y.hashes) for x, y in ((a, b), (b, a))]
    names = [_names(side.view, which) for side, which in zip((a, b), alone, strict=True)]
    both = names[0].keys() & names[1].keys()
    result = []
    for side, known in zip((a, b), names, strict=True):
        mask = np.zeros(len(side.hashes), bool)
        mask[[known[name] for name in both]] = True
        result.append(mask)
    return result


def _names(view: View, which: np.ndarray) -> dict[str, int]:
    """Name -> number of documents."""
    found: dict[str, int] = {}
    for i in range(len(view.parts)):
        begin, end = view.begins[i : i + 2].tolist()
        rows = np.flatnonzero(which[begin:end])
        if len(rows):
            names = view.table(i, ["id"])["id"].take(pa.array(rows)).to_pylist()
            found |= dict(zip(names, (rows + begin).tolist(), strict=True))
    return found


def _only(here: Side, there: Side, which: np.ndarray, changed: np.ndarray) -> dict[str, Any]:
    """Those of one side, by what became of them in the other."""
    numbers = np.flatnonzero(which)
    reasons = _why(here.hashes[numbers], there)
    reasons[(reasons == NOT_READ) & changed[numbers]] = CHANGED
    wanted, why = Wanted(here.view), []
    for reason in np.unique(reasons).tolist():
        chosen = numbers[reasons == reason]
        some = chosen[np.argsort(here.hashes[chosen], kind="stable")[:SAMPLES]]
        group = {
            "why": reason,
            "documents": len(chosen),
            "tokens": int(here.tokens[chosen].sum()),
            "sources": _by_source(here.view, chosen),
            "samples": [wanted.sample(*here.view.place(number)) for number in some.tolist()],
        }
        why.append(group)
    wanted.read()
    why.sort(key=lambda group: (-group["documents"], group["why"]))
    return {"documents": len(numbers), "tokens": int(here.tokens[numbers].sum()), "why": why}


def _why(hashes: np.ndarray, there: Side) -> np.ndarray:
    """[n] of words: what became of documents in the other set of data."""
    order = np.argsort(there.hashes, kind="stable")
    ordered = there.hashes[order]
    at = np.minimum(np.searchsorted(ordered, hashes), max(len(ordered) - 1, 0))
    found = ordered[at] == hashes if len(ordered) else np.zeros(len(hashes), bool)
    first = order[at] if len(ordered) else at
    result = np.full(len(hashes), NOT_READ, dtype=object)
    names = np.array([*(f"dropped by {rule}" for rule in there.rules), LEFT_OUT], dtype=object)
    result[found] = names[there.verdict[first[found]]]  # -1 is the last
    result[np.isin(hashes, there.hashes[there.kept])] = COPY
    return result


def _by_source(view: View, numbers: np.ndarray) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part, n in zip(view.parts, np.histogram(numbers, bins=view.begins)[0].tolist(), strict=True):
        if n:
            counts[part.source] = counts.get(part.source, 0) + n
    return counts


def _rules(a: View, b: View) -> list[dict[str, Any]]:
    """{rule, a, b}: what each keeps and how many it drops; None where there is no such rule."""
    by_name: list[Mapping[str, Any]] = [{rule["rule"]: rule for rule in view.rules} for view in (a, b)]
    names = dict.fromkeys([*by_name[0], *by_name[1]])

    def said(rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
        names = ("keeps", "dropped", "failed", "failed_alone")
        return None if rule is None else {name: rule[name] for name in names}

    return [
        {"rule": name, "a": said(by_name[0].get(name)), "b": said(by_name[1].get(name))} for name in names
    ]


def _lengths(a: Side, b: Side) -> dict[str, Any]:
    """Tokens a document, of both over the same bins."""
    kept = [side.tokens[side.kept] for side in (a, b)]
    values = np.concatenate(kept)
    edges = octaves(max(int(values.min()), 1), int(values.max()))
    return {
        "edges": edges.tolist(),
        **{name: np.histogram(tokens, edges)[0].tolist() for name, tokens in zip("ab", kept, strict=True)},
    }
