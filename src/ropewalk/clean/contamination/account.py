"""What was found of each evaluation set, over all texts: to be read, and for scores on what was not found."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ropewalk.clean.contamination.items import EvaluationItem

FORMAT = 1
EXAMPLES = 5
"""Places shown of each set, the worst ones."""
_CONTEXT = 80
_SPAN = 400
COMMONPLACE = 10
"""A question found without its answer in more documents than so many may be a turn of phrase (the same number
as in Brown et al. 2020, appendix C)."""


@dataclass
class _Set:
    items: int = 0
    not_looked_for: list[str] = field(default_factory=list)
    documents: int = 0
    found: dict[str, int] = field(default_factory=dict)
    """item -> documents"""
    answered: set[str] = field(default_factory=set)
    worst: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Account:
    """Adds up the step's tables, in any order. `files` says where a set was read from, and is kept as it is
    said: path and sha256, by which an evaluation knows its file again."""

    def __init__(
        self,
        items: Sequence[EvaluationItem],
        too_short: Sequence[EvaluationItem] = (),
        files: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._files = files or {}
        self._sets: dict[str, _Set] = {}
        self.documents = self._contaminated = 0
        for item in items:
            self._sets.setdefault(item.set, _Set()).items += 1
        for item in too_short:
            self._sets[item.set].not_looked_for.append(item.id)

    def add(self, table: pa.Table, texts: Sequence[str], documents: Sequence[str]) -> None:
        """A table that the step wrote, of `texts`, whose names are `documents`. Rows without items may be
        left out, and are then counted in `self.documents` by the caller."""
        self.documents += len(texts)
        for text, document, found in zip(
            texts, documents, table["contamination_items"].to_pylist(), strict=True
        ):
            self._contaminated += bool(found)
            for name in {one["set"] for one in found}:
                self._sets[name].documents += 1
            for name, item in {(one["set"], one["item"]) for one in found}:
                counts = self._sets[name].found
                counts[item] = counts.get(item, 0) + 1
            for one in found:
                own = self._sets[one["set"]]
                if one["answer_found"]:
                    own.answered.add(one["item"])
                # The order of texts must not matter: what is worst is decided by the place alone.
                key = (
                    one["share"],
                    one["answer_found"],
                    one["end"] - one["start"],
                    document,
                    one["start"],
                    one["item"],
                )
                if len(own.worst) < EXAMPLES or key > own.worst[0][0]:
                    heapq.heappush(own.worst, (key, _example(one, text, document)))
                    if len(own.worst) > EXAMPLES:
                        heapq.heappop(own.worst)

    def report(self) -> dict[str, Any]:
        """Everything, JSON-able. `contaminated` of a set are ids of items: for a file's rows, their numbers
        from 0. `commonplace` are those of them that were found in many documents, never with their answer."""
        return {
            "format": FORMAT,
            "documents": self.documents,
            "contaminated_documents": self._contaminated,
            "sets": {name: self._set(name, own) for name, own in sorted(self._sets.items())},
        }

    def _set(self, name: str, own: _Set) -> dict[str, Any]:
        found = sorted(own.found, key=_numbers_first)
        return {
            **self._files.get(name, {}),
            "items": own.items,
            "found": len(found),
            "found_with_answer": len(own.answered),
            "share": len(found) / own.items,
            "documents": own.documents,
            "not_looked_for": len(own.not_looked_for),
            "contaminated": found,
            "commonplace": [i for i in found if own.found[i] > COMMONPLACE and i not in own.answered],
            "examples": [example for _, example in sorted(own.worst, key=lambda one: one[0], reverse=True)],
        }


def _numbers_first(id: str) -> tuple[int, str]:
    return (int(id), id) if id.isascii() and id.isdigit() else (1 << 62, id)


def _example(one: Mapping[str, Any], text: str, document: str) -> dict[str, Any]:
    start, end = one["start"], one["end"]
    span = text[start:end]
    return {
        "document": document,
        "item": one["item"],
        "share": round(one["share"], 4),
        "answer_found": one["answer_found"],
        "start": start,
        "end": end,
        "before": text[max(0, start - _CONTEXT) : start],
        "span": span if len(span) <= _SPAN else span[:_SPAN] + "…",
        "after": text[end : end + _CONTEXT],
    }
