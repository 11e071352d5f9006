"""Documents that mean the same, by the vectors of a model: paraphrases, translations."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ropewalk.clean.duplicates.rows import Clusters, Rows, cluster_tables, rows_of
from ropewalk.clean.step import Joined, Parts, Texts

BLOCK = 2048
"""Vectors compared with as many others at once: 16 MB of products."""
SLACK = 1e-4
"""What float32 products may be off; pairs this near the threshold are computed again in float64, each alone,
so that no block's shape decides."""


@dataclass(frozen=True)
class SimilarVectors(Joined):
    """`embed` gives [n, d] floats for n texts; two texts are similar where the cosine of their vectors is
    `threshold` or more (SemDeDup, Abbas et al. 2023). Clusters are what hangs together by such pairs.

    Every vector is compared with every other one: exact, and its time grows with the square of their number
    (100,000 of 384 numbers: a good minute of a core). `model` names the model and its version: the settings
    say nothing else of `embed`.
    """

    embed: Callable[[Sequence[str]], np.ndarray]
    model: str
    threshold: float = 0.95

    name = "similar_vectors"
    attributes: ClassVar[Mapping[str, str]] = {
        "similar_of": "number of the row kept of the cluster of similar vectors, -1 where it is this one",
        "similars": "how many rows the cluster of similar vectors has",
    }

    def settings(self) -> Any:
        return {"model": self.model, "threshold": self.threshold}

    def map(self, texts: Texts) -> pa.Table:
        """`vector`: of length 1, or 0 where the model's is."""
        vectors = np.asarray(self.embed(texts.texts), np.float64)
        if len(texts) == 0:
            return pa.table({"vector": pa.array([], pa.list_(pa.float32()))})
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
        offsets = np.arange(0, unit.size + 1, unit.shape[1], dtype=np.int32)
        return pa.table({"vector": pa.ListArray.from_arrays(pa.array(offsets), pa.array(unit.ravel()))})

    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        """Two blocks in memory; on disk all vectors."""
        rows = rows_of(parts)
        clusters = Clusters(len(rows))
        with tempfile.TemporaryFile() as file:
            rank, vectors = _gather(parts, rows, file)
            for a in range(0, len(rank), BLOCK):
                for b in range(a, len(rank), BLOCK):
                    left, right = _similar(vectors[a : a + BLOCK], vectors[b : b + BLOCK], self.threshold)
                    clusters.join(rank[a + left], rank[b + right])
        yield from cluster_tables(rows, clusters, ("similar_of", "similars"))


def _gather(parts: Parts, rows: Rows, file: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ranks int64 [n], vectors float32 [n, d] in the file) of the rows that are kept."""
    for part in rows.parts:
        vectors = parts.mapped(part, ["vector"])["vector"].combine_chunks().flatten().to_numpy()
        if len(vectors):
            file.write(vectors.reshape(parts.sizes[part], -1)[rows.kept[rows.of(part)]].tobytes())
    rank = rows.rank[rows.kept]
    if not file.tell():
        return rank, np.empty((len(rank), 0), np.float32)
    file.flush()
    return rank, np.memmap(file, np.float32, "r").reshape(len(rank), -1)


def _similar(left: np.ndarray, right: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows of both whose product reaches the threshold."""
    a, b = np.nonzero(left @ right.T >= threshold - SLACK)
    exact = (left[a].astype(np.float64) * right[b]).sum(axis=1)
    similar = exact >= threshold
    return a[similar], b[similar]
