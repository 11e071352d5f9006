"""Which language a text is in: py3langid's model (BSD licence, comes with its package), all texts in step.

The model is a naive Bayes classifier over byte n-grams, which an automaton finds (Lui, Baldwin 2012:
langid.py). Here the automaton of each text takes its next byte together with all others of the batch.
"""

import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import Step, Texts
from ropewalk.errors import UserError

CHARACTERS = 3000
"""What is looked at of a text: its first ones."""


class Language(Step):
    """The likeliest language of each text's beginning, and how likely it is."""

    name = "language"
    attributes: Mapping[str, str] = {
        "language": f"ISO 639 code of the language of the first {CHARACTERS} characters; zxx is none, as "
        "in code and tables, and und is nothing to tell from",
        "language_score": "its probability as the model has it, 0 to 1: calibrated for whole sentences",
    }

    def settings(self) -> Any:
        _model()  # so that a missing package is said before anything is read
        return {"py3langid": version("py3langid"), "characters": CHARACTERS}

    def map(self, texts: Texts) -> pa.Table:
        found = [_model().classify(*visits) for visits in _visits([_encoded(t) for t in texts.texts])]
        return pa.table(
            {
                "language": pa.array([label for label, _ in found], pa.string()),
                "language_score": pa.array([round(score, 4) for _, score in found], pa.float64()),
            }
        )


def _encoded(text: str) -> bytes:
    """As the model was trained."""
    text = text[:CHARACTERS]
    text = text.lower() if text.isupper() else text
    return unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")


def _visits(texts: list[bytes]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(features, how often each is there, bytes) of each text."""
    model = _model()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    lengths = np.array([len(texts[i]) for i in order], np.int64)
    longest = int(lengths.max(initial=0))
    letters = np.zeros((longest, len(texts)), np.uint8)
    for column, i in enumerate(order):
        letters[: lengths[column], column] = np.frombuffer(texts[i], np.uint8)
    features = np.full((longest, len(texts)), -1, np.int32)
    state = np.zeros(len(texts), np.int64)
    running = np.searchsorted(-lengths, -np.arange(longest), side="left")  # longest first
    for place, count in enumerate(running.tolist()):
        state = model.moves[model.rows[state[:count]] + letters[place, :count]]
        features[place, :count] = model.outputs[state]
    result: list[Any] = [None] * len(texts)
    for column, i in enumerate(order):
        seen = np.sort(features[: lengths[column], column])
        seen = seen[np.searchsorted(seen, 0) :]
        first = np.flatnonzero(np.diff(seen, prepend=-1))
        result[i] = (seen[first], np.diff(first, append=len(seen)), len(texts[i]))
    return result


class _Model:
    """py3langid's automaton and its tables as arrays: moves of a state are moves[rows[state] + byte]."""

    def __init__(self) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise UserError('languages need an extra: pip install "ropewalk[data]"') from error
        own = LanguageIdentifier.from_model_file(MODEL_FILE)
        self.moves = np.asarray(own.tk_nextmove).astype(np.int32)
        self.rows = np.asarray(own.tk_row).astype(np.int64) << 8
        self.outputs = np.asarray(own.tk_output).astype(np.int32)
        self.weights = np.asarray(own.nb_ptc).astype(np.float32)
        self.prior = np.asarray(own.nb_pc).astype(np.float32)
        self.labels = own.labels
        self.places = np.array([own.labels.index(name) for name in own.nb_classes])

    def classify(self, features: np.ndarray, counts: np.ndarray, size: int) -> tuple[str, float]:
        """A text's language and its probability: temperature sqrt(bytes), as py3langid normalizes."""
        if not len(features):
            return "und", 0.0
        scores = np.log1p(counts.astype(np.float32)) @ self.weights[features] + self.prior
        scores /= np.sqrt(size)
        odds = np.exp(scores - scores.max())
        odds = np.bincount(self.places, odds / odds.sum(), minlength=len(self.labels))
        best = int(odds.argmax())
        return self.labels[best], float(odds[best])


@cache
def _model() -> _Model:
    return _Model()
