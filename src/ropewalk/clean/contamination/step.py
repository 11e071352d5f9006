"""The cleaning step that says which texts hold items of evaluation sets, how much of them, and where."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import opens
from ropewalk.clean.contamination.evidence import Evidence, Occurrence
from ropewalk.clean.contamination.index import LONG, Hits, Index
from ropewalk.clean.contamination.items import EvaluationItem
from ropewalk.clean.step import SPANS, Step, Texts
from ropewalk.clean.words import Words

ITEMS = pa.list_(
    pa.struct(
        {
            "set": pa.string(),
            "item": pa.string(),
            "share": pa.float32(),
            "start": pa.int32(),
            "end": pa.int32(),
            "answer_found": pa.bool_(),
        }
    )
)
"""Type of `contamination_items`: `start` to `end` are characters of the text, and hold the question."""
SHARE = 0.5
"""Least share of a question's n-grams that counts as finding it."""


def digest(items: Sequence[EvaluationItem]) -> str:
    """Says of two lists of items whether they are the same."""
    told = json.dumps([[i.set, i.id, i.question, i.answer, i.choices] for i in items])
    return hashlib.sha256(told.encode()).hexdigest()


class Contamination(Step):
    """Finds questions of evaluation sets in texts, whatever their case, punctuation and white space.

    Of a question of 13 words or more at least `share` of its n-grams of 13 words must be found close
    together, less those that more than 3 questions have. A shorter one must be found whole, and be telling:
    by its words' rarity, by being asked, by standing by itself, or by its answer nearby. Questions under 4
    words are not looked for.
    """

    name = "contamination"
    attributes: Mapping[str, str] = {
        "contaminated": "a question of an evaluation set is in the text",
        "contaminated_by": "the sets of these questions, in alphabetical order",
        "contamination": "largest share of a question's n-grams found in the text, 0 to 1",
        "contamination_items": "questions found: set, item, share, place in characters, answer there or not",
        "contamination_spans": "places of questions and their answers, by set",
    }

    def __init__(self, items: Sequence[EvaluationItem], share: float = SHARE) -> None:
        self.share = share
        self._evidence = Evidence(items)
        self._index = Index(self._evidence.questions)
        self._settings = {"share": share, "items": digest(items)}

    def settings(self) -> Any:
        return self._settings

    @property
    def too_short(self) -> list[EvaluationItem]:
        """What is not looked for."""
        return self._evidence.too_short

    def map(self, texts: Texts) -> pa.Table:
        words = texts.words.only
        index = self._index
        found = _clusters(index.find(words), words, index)
        # Of a short question, or one of common phrases, a share says nothing before it is weighed.
        weighed = index.boilerplate[found.question] | (index.words[found.question] < LONG)
        largest = np.zeros(len(texts), np.float32)
        np.maximum.at(largest, found.document[~weighed], found.share[~weighed])
        occurrences: dict[int, list[Occurrence]] = {}
        for i in np.flatnonzero(found.share >= self.share).tolist():
            question, document, share = int(found.question[i]), int(found.document[i]), float(found.share[i])
            first, last = int(found.first[i]), int(found.last[i])
            common = bool(index.boilerplate[question])
            there = self._evidence.weigh(texts, question, share, first, last, common)
            if there:
                occurrences.setdefault(document, []).extend(there)
                largest[document] = max(largest[document], share)
        return _table(len(texts), occurrences, largest)


@dataclass(frozen=True)
class _Clusters:
    """Places where n-grams of one question are close to each other, all arrays [n]: the first and last word,
    and the share of the question's n-grams."""

    document: np.ndarray
    question: np.ndarray
    share: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _clusters(hits: Hits, words: Words, index: Index) -> _Clusters:
    """N-grams no further from each other than the question is long: one place in the text."""
    document = words.document[hits.first]
    order = np.lexsort((hits.first, hits.question, document))
    document, question = document[order], hits.question[order]
    first, gram = hits.first[order], hits.gram[order]
    new = opens(question, document)
    new[1:] |= first[1:] - first[:-1] > index.words[question[1:]]
    cluster = np.cumsum(new) - 1
    begins = np.flatnonzero(new)
    ends = np.append(begins[1:], len(first))[: len(begins)] - 1
    order = np.lexsort((gram, cluster))
    different = opens(gram[order], cluster[order])
    counts = np.bincount(cluster[order][different], minlength=len(begins))
    own = question[begins]
    length = np.minimum(index.words[own], LONG)
    share = (counts / np.maximum(index.grams[own], 1)).astype(np.float32)
    return _Clusters(document[begins], own, share, first[begins], first[ends] + length - 1)


def _table(texts: int, found: Mapping[int, list[Occurrence]], largest: np.ndarray) -> pa.Table:
    kept = [_apart(found.get(document, ())) for document in range(texts)]
    items = [
        [
            {
                "set": one.item.set,
                "item": one.item.id,
                "share": one.share,
                "start": one.start,
                "end": one.end,
                "answer_found": one.answer is not None,
            }
            for one in here
        ]
        for here in kept
    ]
    sets = [sorted({one.item.set for one in here}) for here in kept]
    columns = {
        "contaminated": pa.array([bool(here) for here in kept], pa.bool_()),
        "contaminated_by": pa.array(sets, pa.list_(pa.string())),
        "contamination": pa.array(largest, pa.float32()),
        "contamination_items": pa.array(items, ITEMS),
        "contamination_spans": pa.array([_spans(here) for here in kept], SPANS),
    }
    return pa.table(columns)


def _apart(occurrences: Sequence[Occurrence]) -> list[Occurrence]:
    """Each item once at each place (several ways of writing are looked for), in the order of the text."""
    kept: dict[tuple[str, str], list[Occurrence]] = {}
    for one in sorted(occurrences, key=lambda o: (-o.share, o.answer is None, o.start, o.end)):
        same = kept.setdefault((one.item.set, one.item.id), [])
        if all(one.end <= other.start or other.end <= one.start for other in same):
            same.append(one)
    return sorted(
        (one for same in kept.values() for one in same), key=lambda o: (o.start, o.end, o.item.set, o.item.id)
    )


def _spans(occurrences: Sequence[Occurrence]) -> list[dict[str, Any]]:
    """Questions and answers as places that do not overlap; where two sets do, the first one's name stays."""
    places = {(o.start, o.end, o.item.set) for o in occurrences}
    places |= {(*o.answer, o.item.set) for o in occurrences if o.answer is not None}
    spans: list[dict[str, Any]] = []
    for start, end, name in sorted(places):
        if spans and start < spans[-1]["end"]:
            if name == spans[-1]["kind"]:
                spans[-1]["end"] = max(end, spans[-1]["end"])
                continue
            start = spans[-1]["end"]
        if start < end:
            spans.append({"start": start, "end": end, "kind": name})
    return spans
