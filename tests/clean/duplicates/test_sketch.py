"""The sketch estimates the Jaccard similarity without bias; bands keep what they promise."""

import math
import random

import numpy as np
import pytest

from ropewalk.clean.duplicates.sketch import (
    EMPTY,
    band_hashes,
    bands_for,
    candidate_probability,
    shingles_of,
    signatures,
)
from ropewalk.clean.words import mix, words_of
from ropewalk.errors import UserError

from .real import shingles

SIZE = 128


def sketched(sets: list[list[int]], size: int = SIZE) -> np.ndarray:
    hashes = mix(np.array([item for one in sets for item in one], np.uint64))
    document = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    return signatures(hashes, document, len(sets), size)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("union", [3, 40, 200, 3000])
def test_equal_places_are_as_many_as_similarity_says(union, common):
    """Mean within four standard errors, spread not above that of independent permutations (by more than
    chance), for sets smaller and larger than the sketch."""
    pairs, both = 400 if union < 3000 else 60, round(union * common)
    similarity = both / union
    sets = []
    for pair in range(pairs):
        items = range(pair * union, (pair + 1) * union)
        mine = both + (union - both) // 2
        sets += [list(items[:mine]), [*items[:both], *items[mine:]]]
    found = sketched(sets)
    estimates = (found[0::2] == found[1::2]).mean(axis=1)
    independent = math.sqrt(similarity * (1 - similarity) / SIZE)
    assert abs(estimates.mean() - similarity) <= 4 * independent / math.sqrt(pairs)
    assert estimates.std() <= independent * (1 + 4 / math.sqrt(2 * pairs))


def test_a_sketch_is_that_of_the_set_alone():
    """Order, repetitions and what else is in the batch do not matter; equal sets have equal sketches."""
    rng = random.Random(0)
    sets = [[rng.randrange(10**6) for _ in range(n)] for n in (1, 2, 5, 30, 300, 3000)]
    together = sketched([list(reversed(one)) + one[:3] * 500 for one in sets])
    alone = np.concatenate([sketched([one]) for one in sets])
    assert (together == alone).all()
    assert (together != EMPTY).all()
    assert (sketched([[], sets[0]])[0] == EMPTY).all()


def test_shingles_are_runs_of_words_and_short_texts_are_one():
    texts = ["a b c d e f", "", "A, b; c", "a b c", "x", "...", "c b a", "a b c d a b c d"]
    hashes, document = shingles_of(words_of(texts).only, 4)
    assert (np.diff(document) >= 0).all()
    found = [set(hashes[document == i].tolist()) for i in range(len(texts))]
    expected = [shingles(text, 4) for text in texts]
    for a in range(len(texts)):
        for b in range(len(texts)):
            assert len(found[a] & found[b]) == len(expected[a] & expected[b])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_bands_meet_the_target_with_the_fewest_permutations(threshold, recall):
    """By trying all: recall always, noise where 512 permutations allow it and as little as they do else."""
    shapes = [(b, r) for r in range(1, 40) for b in range(1, 512 // r + 1)]
    enough = [shape for shape in shapes if candidate_probability(threshold, *shape) >= recall - 1e-9]
    noise = {shape: candidate_probability(threshold / 2, *shape) for shape in enough}
    quiet = [b * r for (b, r), n in noise.items() if n <= 0.02]
    bands, rows = bands_for(threshold, recall)
    assert (bands, rows) in enough
    if quiet:
        assert noise[bands, rows] <= 0.02
        assert bands * rows == min(quiet)
    else:
        assert noise[bands, rows] == min(noise.values())


@pytest.mark.parametrize(("threshold", "recall"), [(0.0, 0.9), (1.0, 0.9), (0.8, 0.0), (0.8, 1.0)])
def test_what_no_bands_can_do_is_refused(threshold, recall):
    with pytest.raises(UserError, match="between 0 and 1"):
        bands_for(threshold, recall)


def test_bands_agree_as_often_as_the_closed_form_says():
    bands, rows, union, both, pairs = 17, 8, 300, 240, 400
    sets = []
    for pair in range(pairs):
        items = range(pair * union, (pair + 1) * union)
        sets += [list(items[: both + 30]), [*items[:both], *items[both + 30 :]]]
    hashes = band_hashes(sketched(sets, bands * rows), bands)
    found = (hashes[:, 0::2] == hashes[:, 1::2]).any(axis=0).mean()
    expected = candidate_probability(both / union, bands, rows)
    assert abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / pairs)
    equal = (hashes == hashes[:, :1]).all(axis=0)
    assert equal.tolist() == [True] + [False] * (2 * pairs - 1)
