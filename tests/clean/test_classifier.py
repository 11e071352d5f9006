"""A trained classifier tells two kinds of text apart it has not seen, says how sure it is, and is safe."""

import json
import random

import numpy as np
import pytest

from ropewalk.clean.classifier import BITS, Classifier, QualityClassifier, features, train_classifier
from ropewalk.clean.step import Texts
from ropewalk.clean.words import words_of
from ropewalk.errors import UserError

from .samples import ODD


def written(rng: random.Random, vocabulary: str, other: str, count: int) -> list[str]:
    """Texts of 40 words, of which a fifth to four fifths are of the first vocabulary."""
    texts = []
    for _ in range(count):
        share = rng.uniform(0.2, 0.8)
        words = (rng.choice((vocabulary if rng.random() < share else other).split()) for _ in range(40))
        texts.append(" ".join(words))
    return texts


ROPE, SEA = "hemp tar twist strand yarn spin", "sail mast deck wave storm harbour"
BOTH = "the of and a is was long strong many old new it"


@pytest.fixture(scope="module")
def trained():
    rng = random.Random(1)
    good, other = written(rng, ROPE, BOTH, 400), written(rng, SEA, BOTH, 300)
    return train_classifier(good, other, seed=3), good, other


def test_it_tells_texts_apart_that_it_has_not_seen(trained):
    classifier = trained[0]
    rng = random.Random(2)
    fresh = [written(rng, words, BOTH, 100) for words in (ROPE, SEA)]
    good, other = (QualityClassifier(classifier).map(Texts(part))["quality"].to_numpy() for part in fresh)
    assert (good > 0.5).mean() > 0.95
    assert (other < 0.5).mean() > 0.95
    assert classifier.report["auc"] > 0.98
    assert classifier.report["texts"] == 70


def test_it_is_unsure_where_the_kinds_are_alike():
    """Labels by chance: the report must show that nothing was learned, and probabilities stay near a half."""
    rng = random.Random(3)
    texts = written(rng, ROPE, BOTH, 1200)
    classifier = train_classifier(texts[:600], texts[600:], seed=0)
    assert 0.35 < classifier.report["auc"] < 0.65
    assert np.abs(classifier.probabilities(words_of(written(rng, ROPE, BOTH, 200))) - 0.5).mean() < 0.15


def test_probabilities_are_shares():
    """A third of the texts of one kind have the other's label: what is said of them is near two thirds."""
    rng = random.Random(4)
    rope, sea = written(rng, ROPE, BOTH, 2700), written(rng, SEA, BOTH, 2700)
    classifier = train_classifier(rope[:1800] + sea[:900], rope[1800:] + sea[900:], seed=0)
    said = classifier.probabilities(words_of(written(rng, ROPE, BOTH, 300)))
    assert said.mean() == pytest.approx(2 / 3, abs=0.1)
    assert classifier.report["calibration_error"] < 0.12


def test_the_same_texts_and_seed_give_the_same_classifier_and_a_saved_one_says_the_same(trained, tmp_path):
    classifier, good, other = trained
    again = train_classifier(good, other, seed=3)
    assert again.fingerprint() == classifier.fingerprint()
    assert train_classifier(good, other, seed=4).fingerprint() != classifier.fingerprint()
    classifier.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert loaded.fingerprint() == classifier.fingerprint()
    assert loaded.report == classifier.report


def test_a_text_has_the_same_quality_whatever_else_is_in_the_batch(trained):
    step = QualityClassifier(trained[0])
    texts = [*ODD, *trained[1][:5]]
    together = step.map(Texts(texts))["quality"].to_pylist()
    assert together == [step.map(Texts([text]))["quality"].to_pylist()[0] for text in texts]
    assert all(0 <= value <= 1 for value in together)


def test_features_are_words_and_pairs_scaled_to_length_one():
    document, bucket, value = features(words_of(["a b a b c", "", "a"]), 1 << BITS)
    assert np.bincount(document, value**2, minlength=3) == pytest.approx([1, 0, 1])
    counts = np.sort(value[document == 0] / value[document == 0].min())
    # a, b, "a b" twice; c, "b a", "b c" once
    assert counts == pytest.approx([1, 1, 1, *[np.log(3) / np.log(2)] * 3])
    assert bucket[document == 2] in bucket[document == 0]


@pytest.mark.parametrize("damage", ["missing", "pickled", "short", "nan", "json", "odd"])
def test_a_damaged_classifier_is_refused(trained, tmp_path, damage):
    trained[0].save(tmp_path)
    weights = tmp_path / "weights.npz"
    if damage == "missing":
        weights.unlink()
    elif damage == "pickled":
        np.savez(weights, weights=np.array([{"a": 1}], dtype=object))
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "nan":
        np.savez(weights, weights=np.full(1 << BITS, np.nan, np.float32))
    elif damage == "odd":
        np.savez(weights, weights=np.zeros(1000, np.float32))
    else:
        (tmp_path / "classifier.json").write_text(json.dumps({"scale": "x"}))
    with pytest.raises(UserError, match=str(tmp_path)):
        Classifier.load(tmp_path)


def test_too_few_texts_are_refused():
    with pytest.raises(UserError, match="needs 50 texts of each kind; there are 60 good and 3 other"):
        train_classifier(["a"] * 60, ["b"] * 3, seed=0)
