"""A classifier of good and other texts that a user trains: as fastText's, linear over hashed words and pairs.

Features are the words and symbols of a text and the pairs of neighbours, hashed into buckets (Joulin et al.
2016), each with ln(1 + count), all of a text scaled to length 1; logistic regression by AdaGrad (Duchi et al.
2011), and on texts that it has not seen a sigmoid that turns scores into probabilities (Platt 1999).
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import Step, Texts
from ropewalk.clean.words import Words, words_of
from ropewalk.errors import UserError
from ropewalk.files import atomic_write, read_json_object

BITS = 18
EPOCHS, RATE, BATCH = 10, 0.3, 128
RARE = 1e-4
"""AdaGrad's sums begin with this: what is seen once or twice moves little and is not learned by heart."""
FEWEST = 50
"""Texts of each kind, at least: with fewer the figures of the tenth that is held out say nothing."""


@dataclass(frozen=True)
class Classifier:
    """`weights` [2^bits] float32 of the buckets; a text's score is their weighted sum, and its probability
    sigmoid(scale * score + bias). `report` has what is known of it from texts it was not trained on."""

    weights: np.ndarray
    scale: float
    bias: float
    report: Mapping[str, float]

    def probabilities(self, words: Words) -> np.ndarray:
        """[texts] float64: how likely each text is one of the good ones."""
        document, bucket, value = features(words, len(self.weights))
        scores = np.bincount(document, self.weights[bucket] * value, minlength=words.texts)
        return _sigmoid(self.scale * scores + self.bias)

    def fingerprint(self) -> str:
        """Hex digits: equal for classifiers that say the same."""
        numbers = np.array([self.scale, self.bias]).tobytes()
        return hashlib.sha256(self.weights.tobytes() + numbers).hexdigest()[:16]

    def save(self, directory: str | Path) -> None:
        """Writes weights.npz and classifier.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, weights=self.weights)
        atomic_write(directory / "weights.npz", buffer.getvalue())
        content = {"scale": self.scale, "bias": self.bias, "report": dict(self.report)}
        atomic_write(directory / "classifier.json", json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(directory: str | Path) -> "Classifier":
        """What `save` wrote. Raises UserError where a file is missing or damaged; nothing is executed."""
        directory = Path(directory)
        content = read_json_object(directory / "classifier.json")
        path = directory / "weights.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("weights.npy").file_size > 4 * 2**24 + 1024:
                    raise ValueError("too large")
            weights = np.load(path, allow_pickle=False)["weights"]
            scale, bias = float(content["scale"]), float(content["bias"])
            report = {str(name): float(value) for name, value in content["report"].items()}
        except (OSError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{directory}: no classifier can be read from it ({error}); train it again"
            ) from error
        size = weights.size
        right = weights.ndim == 1 and weights.dtype == np.float32 and size and not size & (size - 1)
        if not right or not np.isfinite([scale, bias]).all() or not np.isfinite(weights).all():
            raise UserError(f"{path}: no weights of a classifier; train it again")
        return Classifier(weights, scale, bias, report)


class QualityClassifier(Step):
    """The classifier as a step."""

    name = "classifier"
    attributes: Mapping[str, str] = {
        "quality": "probability that the text is of the kind that the classifier learned as good, 0 to 1"
    }

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def settings(self) -> Any:
        return {"classifier": self.classifier.fingerprint()}

    def map(self, texts: Texts) -> pa.Table:
        return pa.table({"quality": self.classifier.probabilities(texts.words)})


def features(words: Words, buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(text int64, bucket int64, value float64), all [n], ordered by text and bucket; each pair once."""
    pairs, first = words.ngrams(2)
    document = np.concatenate([words.document, words.document[first]])
    # The high bits of a pair's hash, so that no pair has the bucket of a word for the same reason as another.
    bucket = np.concatenate([words.hashes, pairs >> np.uint64(20)]) & np.uint64(buckets - 1)
    keys = np.sort(document * buckets + bucket.astype(np.int64))
    opens = np.flatnonzero(np.diff(keys, prepend=-1))
    value = np.log1p(np.diff(opens, append=len(keys)))
    document, bucket = keys[opens] // buckets, keys[opens] % buckets
    length = np.sqrt(np.bincount(document, value**2, minlength=words.texts))
    return document, bucket, value / length[document]


def train_classifier(good: Iterable[str], other: Iterable[str], seed: int) -> Classifier:
    """Learns from eight tenths of the texts, calibrates on one and reports on the last: `accuracy` (at 0.5),
    `auc` (how likely a good text is above another) and `calibration_error` (mean difference between said and
    true shares, in ten bins). Seconds for thousands of texts; the same for the same texts and seed.

    Raises UserError where there are fewer than 50 of a kind.
    """
    texts = (list(good), list(other))
    if min(map(len, texts)) < FEWEST:
        raise UserError(
            f"a classifier needs {FEWEST} texts of each kind; there are {len(texts[0])} good and "
            f"{len(texts[1])} other"
        )
    data = _Data([*texts[0], *texts[1]])
    labels = np.repeat([1.0, 0.0], [len(texts[0]), len(texts[1])])
    rng = np.random.default_rng(seed)
    # Each kind is dealt out by itself, so that all three parts have both in the same shares.
    place = np.concatenate([rng.permutation(len(part)) for part in texts])
    fold = np.select([place % 10 == 0, place % 10 == 1], [2, 1], 0)
    best = (np.inf, Classifier(np.zeros(1, np.float32), 0.0, 0.0, {}))
    for weights in _learn(data, labels, np.flatnonzero(fold == 0), rng):
        scores = data.scores(weights)
        scale, bias = _calibrate(scores[fold == 1], labels[fold == 1])
        loss = -np.log(_sigmoid(np.where(labels == 1, 1, -1) * (scale * scores + bias)))[fold == 1].mean()
        if loss < best[0]:  # the epoch after which unseen texts are foretold best
            report = _report(_sigmoid(scale * scores[fold == 2] + bias), labels[fold == 2])
            best = (loss, Classifier(weights.astype(np.float32), scale, bias, report))
    return best[1]


class _Data:
    """Features of all texts: those of text i lie from offsets[i] to offsets[i + 1]."""

    def __init__(self, texts: Sequence[str]) -> None:
        parts = [features(words, 1 << BITS) for words in _batches(texts)]
        counts = [np.bincount(part[0], minlength=256) for part in parts]
        self.offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts)[: len(texts)])])
        self.bucket = np.concatenate([part[1] for part in parts])
        self.value = np.concatenate([part[2] for part in parts])

    def of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(which of these texts, bucket, value) of some texts' features."""
        sizes = self.offsets[texts + 1] - self.offsets[texts]
        begins = np.cumsum(sizes) - sizes
        own = np.repeat(np.arange(len(texts)), sizes)
        at = np.repeat(self.offsets[texts] - begins, sizes) + np.arange(sizes.sum())
        return own, self.bucket[at], self.value[at]

    def scores(self, weights: np.ndarray) -> np.ndarray:
        own = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        return np.bincount(own, weights[self.bucket] * self.value, minlength=len(self.offsets) - 1)


def _batches(texts: Sequence[str]) -> Iterator[Words]:
    for i in range(0, len(texts), 256):
        yield words_of(texts[i : i + 256])


def _learn(
    data: _Data, labels: np.ndarray, texts: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Weights [buckets] float64 after each epoch. Both kinds weigh the same, however many each has."""
    weights, squares = np.zeros(1 << BITS), np.full(1 << BITS, RARE)
    share = labels[texts].mean()
    balance = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))
    for _ in range(EPOCHS):
        for chosen in np.array_split(rng.permutation(texts), -(-len(texts) // BATCH)):
            own, bucket, value = data.of(chosen)
            score = np.bincount(own, weights[bucket] * value, minlength=len(chosen))
            error = (_sigmoid(score) - labels[chosen]) * balance[chosen] / len(chosen)
            gradient = np.bincount(bucket, error[own] * value, minlength=1 << BITS)
            squares += gradient**2
            weights -= RATE * gradient / np.sqrt(squares)
        yield weights


def _calibrate(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(scale, bias) of Platt's sigmoid, by Newton's method; his targets keep it finite if all are right."""
    positive, negative = labels.sum(), (1 - labels).sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    spread = max(float(scores.std()), 1e-9)
    inputs = np.stack([scores / spread, np.ones(len(scores))], 1)
    solution = np.zeros(2)
    for _ in range(50):
        said = _sigmoid(inputs @ solution)
        gradient = inputs.T @ (said - target)
        curvature = (inputs * (said * (1 - said))[:, None]).T @ inputs + 1e-6 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        solution -= np.clip(step, -1, 1)
    return float(solution[0] / spread), float(solution[1])


def _report(said: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    order = np.argsort(said, kind="stable")
    _, group, sizes = np.unique(said[order], return_inverse=True, return_counts=True)
    rank = np.empty(len(said))
    rank[order] = (np.cumsum(sizes) - (sizes - 1) / 2)[group]  # mean ranks of ties
    positive, negative = labels.sum(), (1 - labels).sum()
    auc = (rank[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative)
    bins = np.minimum((said * 10).astype(int), 9)
    gaps = np.abs(np.bincount(bins, said - labels, minlength=10))
    return {
        "texts": float(len(said)),
        "accuracy": float(((said >= 0.5) == (labels == 1)).mean()),
        "auc": float(auc),
        "calibration_error": float(gaps.sum() / len(said)),
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
