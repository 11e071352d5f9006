"""The cleaning step that says which passages are close to a question of an evaluation set, word order and
single words aside: what n-grams cannot see. It costs a product with all questions for every sentence.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.contamination.items import EvaluationItem, forms
from ropewalk.clean.contamination.step import digest
from ropewalk.clean.step import Step, Texts
from ropewalk.clean.vectors import Vectors

SIMILAR = 0.6
"""Least cosine that counts; for `CharacterNgrams`, chosen by measurement (bench/data_contamination.py)."""
_SIZES = (10, 20, 40)
"""Words of the passages that are compared; a question with the passages that are nearest to its own size."""
_FEWEST = 8
"""Words of the shortest question: of fewer too many are alike."""
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*\s+|\n+")
_PLACES = pa.list_(
    pa.struct(
        {
            "set": pa.string(),
            "item": pa.string(),
            "similarity": pa.float32(),
            "start": pa.int32(),
            "end": pa.int32(),
        }
    )
)


class Paraphrases(Step):
    """Compares passages that begin with a sentence with questions of about their length (8 words at least).

    `vectors` gives their vectors and `vectors_name` says which they are, as part of the settings.
    """

    name = "paraphrases"
    attributes: Mapping[str, str] = {
        "paraphrase": "largest cosine of a passage with a question of an evaluation set, 0 to 1",
        "paraphrase_of": "questions with a passage like them: set, item, cosine, place in characters",
    }

    def __init__(
        self, items: Sequence[EvaluationItem], vectors: Vectors, vectors_name: str, similar: float = SIMILAR
    ) -> None:
        self.similar = similar
        self._vectors = vectors
        counts = np.array([len(ways[0]) for ways in forms(item.question for item in items)], np.int64)
        size = np.argmin(np.abs(np.log(np.maximum(counts, 1)[:, None] / np.array(_SIZES))), 1)
        chosen = [np.flatnonzero((size == s) & (counts >= _FEWEST)).tolist() for s in range(len(_SIZES))]
        self._items = [[items[i] for i in numbers] for numbers in chosen]
        self._own = [vectors([item.question for item in own]) if own else None for own in self._items]
        self._settings = {"similar": similar, "vectors": vectors_name, "items": digest(items)}

    def settings(self) -> Any:
        return self._settings

    def map(self, texts: Texts) -> pa.Table:
        largest, found = [], []
        for text in texts.texts:
            best: dict[tuple[str, str], dict[str, Any]] = {}
            top = 0.0
            for items, own, size in zip(self._items, self._own, _SIZES, strict=True):
                if own is None or not text.strip():
                    continue
                places = list(passages(text, size))
                cosines = self._vectors([text[a:b] for a, b in places]) @ own.T
                top = max(top, float(cosines.max(initial=0.0)))
                for row, column in np.argwhere(cosines >= self.similar).tolist():
                    item, cosine = items[column], float(cosines[row, column])
                    same = best.get((item.set, item.id))
                    if same is None or cosine > same["similarity"]:
                        start, end = places[row]
                        place = {"set": item.set, "item": item.id, "similarity": cosine}
                        best[item.set, item.id] = {**place, "start": start, "end": end}
            largest.append(top)
            found.append(sorted(best.values(), key=lambda one: (one["start"], one["set"], one["item"])))
        columns = {"paraphrase": pa.array(largest, pa.float32()), "paraphrase_of": pa.array(found, _PLACES)}
        return pa.table(columns)


def passages(text: str, words: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of whole sentences whose number of words is nearest to `words`, one from each
    sentence on; a long sentence is one by itself."""
    edges = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    edges = [edge for i, edge in enumerate(edges) if i == 0 or edge > edges[i - 1]]
    counts = [len(text[a:b].split()) for a, b in pairwise(edges)]
    for first, count in enumerate(counts):
        last, total = first, count
        while last + 1 < len(counts) and abs(total + counts[last + 1] - words) < abs(total - words):
            last += 1
            total += counts[last]
        if total:
            yield edges[first], edges[last + 1]
