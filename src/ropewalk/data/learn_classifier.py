"""A quality classifier from two sources, what it reaches on texts held out, and the words that it goes by."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.clean.classifier import Classifier, train_classifier
from ropewalk.clean.words import words_of
from ropewalk.data.parts import Progress
from ropewalk.data.readers import Source
from ropewalk.data.texts import batches_of
from ropewalk.errors import UserError

SHARE, LEAST = 0.01, 5
"""A word tells something if it is in so many of the texts, in this share of them and in this number."""


@dataclass(frozen=True)
class Learned:
    """`good` and `other` are words, the most telling first, each with the probability that the classifier
    gives to a text of that word alone."""

    directory: Path
    report: dict[str, float]
    texts: tuple[int, int]
    good: list[tuple[str, float]]
    other: list[tuple[str, float]]

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def learn_classifier(
    good: Source,
    other: Source,
    directory: str | Path,
    *,
    seed: int = 0,
    words: int = 20,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Learned:
    """Trains on all texts of both sources (they are kept in memory), and writes the classifier.

    Raises UserError for a source that cannot be read or has too few texts, and where `directory` exists
    (unless `overwrite`).
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise UserError(f"{directory}: already exists; nothing was overwritten (--overwrite replaces it)")
    texts = [[r.plain for batch in batches_of(source, progress) for r in batch] for source in (good, other)]
    classifier = train_classifier(texts[0], texts[1], seed)
    classifier.save(directory)
    ranked = telling(classifier, [*texts[0], *texts[1]])
    return Learned(
        directory,
        dict(classifier.report),
        (len(texts[0]), len(texts[1])),
        [pair for pair in ranked[:words] if pair[1] > 0.5],
        [pair for pair in ranked[::-1][:words] if pair[1] < 0.5],
    )


def telling(classifier: Classifier, texts: Sequence[str]) -> list[tuple[str, float]]:
    """(word, probability of a text of that word alone), the best sign of a good text first; of the words that
    are in enough of the texts."""
    found: Counter[str] = Counter()
    for first in range(0, len(texts), 256):
        some = texts[first : first + 256]
        words = words_of(some).only
        begins = words.begins[words.document]
        places = (words.document, words.starts - begins, words.ends - begins)
        met = {(i, some[i][a:b].lower()) for i, a, b in zip(*(p.tolist() for p in places), strict=True)}
        found.update(word for _, word in met)
    least = max(LEAST, SHARE * len(texts))
    enough = sorted(word for word, count in found.items() if count >= least)
    if not enough:
        return []
    probabilities = classifier.probabilities(words_of(enough))
    order = np.argsort(-probabilities, kind="stable")
    return [(enough[i], float(probabilities[i])) for i in order]
