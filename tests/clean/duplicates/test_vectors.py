"""Similar vectors are found exactly: as by all pairs in float64, whatever the blocks."""

import random

import numpy as np
import pytest

from ropewalk.clean.duplicates.vectors import SimilarVectors

from .parts import reduced


def vectors(count: int, seed: int) -> np.ndarray:
    """Some of them near others, at all distances, one zero."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, 24))
    for row in range(1, count, 2):
        found[row] = found[rng.integers(row)] + rng.normal(size=24) * rng.uniform(0, 0.8)
    found[5] = 0
    return found * rng.uniform(0.1, 10, size=(count, 1))


@pytest.mark.parametrize(("sizes", "block"), [([150], 2048), ([40, 0, 110], 7), ([150], 1)])
def test_clusters_are_those_of_all_pairs(sizes, block, monkeypatch):
    monkeypatch.setattr("ropewalk.clean.duplicates.vectors.BLOCK", block)
    table = vectors(150, seed=1)
    step = SimilarVectors(lambda texts: table[[int(text) for text in texts]].reshape(-1, 24), "test", 0.9)
    rng = random.Random(2)
    kept = [rng.random() < 0.9 for _ in table]
    preference = [float(rng.randrange(3)) for _ in table]
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)
    near = (unit @ unit.T >= 0.9) & np.outer(kept, kept)
    label = list(range(150))
    for _ in range(20):
        for a, b in np.argwhere(near):
            label[a] = label[b] = min(label[a], label[b], key=lambda row: (preference[row], row))
    found = reduced(step, [str(row) for row in range(150)], sizes, batch=32, kept=kept, preference=preference)
    assert [row if of == -1 else of for row, of in enumerate(found["similar_of"])] == label
    assert found["similars"] == [label.count(one) for one in label]
    assert max(found["similars"]) > 3
    assert found["similars"][5] == 1


def test_nothing_at_all_gives_nothing():
    step = SimilarVectors(lambda texts: np.ones((len(texts), 3)), "test")
    assert reduced(step, []) == {"similar_of": [], "similars": []}
    assert reduced(step, ["a", "b"])["similar_of"] == [-1, 0]
