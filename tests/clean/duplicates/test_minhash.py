"""Near duplicates: what is found, that nothing else is, and that neither parts nor batches matter."""

import random
from collections import Counter

import numpy as np
import pytest

from ropewalk.clean.duplicates.jaccard import ShingleSets
from ropewalk.clean.duplicates.minhash import NearDuplicates
from ropewalk.clean.step import Joined

from .parts import MemoryParts, reduced
from .real import changed, jaccard, pages, shingles


@pytest.fixture(scope="module")
def corpus(shared) -> list[str]:
    """300 pages and 300 changed ones, more or less, some of them changed again; shuffled."""
    rng = random.Random(0)
    texts = pages(shared, 300)
    for _ in range(300):
        texts.append(changed(rng.choice(texts), rng.choice([0.0, 0.005, 0.01, 0.02, 0.05]), rng))
    rng.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def similarity(corpus) -> dict[tuple[int, int], float]:
    """Of all pairs that have a shingle in common, by plain Python."""
    sets = [shingles(text, 5) for text in corpus]
    places: dict[tuple[str, ...], list[int]] = {}
    for row, one in enumerate(sets):
        for shingle in one:
            places.setdefault(shingle, []).append(row)
    common = Counter((a, b) for rows in places.values() for i, a in enumerate(rows) for b in rows[i + 1 :])
    return {(a, b): n / (len(sets[a]) + len(sets[b]) - n) for (a, b), n in common.items()}


def components(size: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    """By merging Python sets."""
    of = {row: {row} for row in range(size)}
    for a, b in pairs:
        if of[a] is not of[b]:
            of[a] |= of[b]
            for row in of[b]:
                of[row] = of[a]
    return [of[row] for row in range(size)]


def test_pairs_at_the_threshold_are_found_and_no_others(corpus, similarity):
    step = NearDuplicates()
    found = reduced(step, corpus, [100, 0, 250, 250])
    root = [row if of == -1 else of for row, of in enumerate(found["near_duplicate_of"])]
    similar = [pair for pair, s in similarity.items() if s >= step.threshold]
    assert len(similar) > 200
    recalled = sum(root[a] == root[b] for a, b in similar) / len(similar)
    assert recalled >= 0.95
    # each cluster is one of the exact ones or a piece of it: not a pair is there that should not be
    exact = components(len(corpus), similar)
    assert all(root[row] in exact[row] for row in range(len(corpus)))
    assert found["near_duplicates"] == [Counter(root)[one] for one in root]


def test_clusters_are_the_closure_of_the_checked_candidates(corpus, similarity):
    """With the bands computed apart: the union-find of all pairs that share a band and are similar."""
    step = NearDuplicates(threshold=0.6, recall=0.8)
    table = MemoryParts(step, corpus).mapped(0)
    hashes = np.array([table[name].to_numpy() for name in table.column_names if name.startswith("band")])
    pairs = [(a, b) for (a, b), s in similarity.items() if s >= 0.6 and (hashes[:, a] == hashes[:, b]).any()]
    expected = [min(of) for of in components(len(corpus), pairs)]
    found = reduced(step, corpus)["near_duplicate_of"]
    assert [row if of == -1 else of for row, of in enumerate(found)] == expected


@pytest.mark.parametrize(("sizes", "batch"), [([1, 599], 600), ([150] * 4, 7), ([0, 299, 301, 0], 1)])
def test_parts_and_batches_do_not_matter(corpus, sizes, batch):
    step = NearDuplicates()
    assert reduced(step, corpus, sizes, batch=batch) == reduced(step, corpus)


def test_bands_read_in_several_passes_give_the_same(corpus, monkeypatch):
    expected = reduced(NearDuplicates(), corpus)
    monkeypatch.setattr("ropewalk.clean.duplicates.minhash.BAND_BYTES", 8 * len(corpus) * 3)
    monkeypatch.setattr("ropewalk.clean.duplicates.jaccard.AT_ONCE", 3000)
    monkeypatch.setattr("ropewalk.clean.duplicates.minhash.TEXTS_AT_ONCE", 17)
    assert reduced(NearDuplicates(), corpus) == expected


def test_the_preferred_of_a_cluster_stays_and_dropped_ones_take_no_part(corpus):
    first = reduced(NearDuplicates(), corpus)
    rng = random.Random(5)
    preference = [float(rng.randrange(4)) for _ in corpus]
    found = reduced(NearDuplicates(), corpus, [300, 300], preference=preference)
    clusters: dict[int, list[int]] = {}
    for row, of in enumerate(first["near_duplicate_of"]):
        clusters.setdefault(row if of == -1 else of, []).append(row)
    for cluster in clusters.values():
        best = min(cluster, key=lambda row: (preference[row], row))
        assert {found["near_duplicate_of"][row] for row in cluster} <= {best, -1}
        assert found["near_duplicate_of"][best] == -1
    pair = next(rows for rows in clusters.values() if len(rows) == 2)
    kept = [row != pair[0] for row in range(len(corpus))]
    without = reduced(NearDuplicates(), corpus, [300, 300], kept=kept)
    assert [without["near_duplicate_of"][row] for row in pair] == [-1, -1]
    assert [without["near_duplicates"][row] for row in pair] == [1, 1]


def test_short_and_empty_texts(shared):
    texts = ["", "one", "One!", "", "two words", "...", "words two", "two, words", "???"]
    assert isinstance(NearDuplicates(), Joined)
    assert reduced(NearDuplicates(), texts)["near_duplicate_of"] == [-1, -1, 1, -1, -1, -1, -1, 4, -1]
    assert reduced(NearDuplicates(), []) == {"near_duplicate_of": [], "near_duplicates": []}


def test_true_similarity_is_that_of_python_sets(shared):
    rng = random.Random(3)
    texts = pages(shared, 20, size=500)
    texts += [changed(text, 0.05, rng) for text in texts] + ["", "a b"]
    left, right = np.array([(a, b) for a in range(len(texts)) for b in range(a)]).T
    with ShingleSets(5) as sets:
        sets.add(texts[:13])
        sets.add(texts[13:])
        found = sets.similarities(left, right, 0.0)
        large = sets.similarities(left, right, 0.9)
    plain = [shingles(text, 5) for text in texts]
    expected = np.array([jaccard(plain[a], plain[b]) for a, b in zip(left, right, strict=True)])
    assert np.allclose(found, expected)
    assert (large[expected >= 0.9] == found[expected >= 0.9]).all()
    assert ((large == found) | (large == 0)).all()
