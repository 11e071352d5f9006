"""Documents that are nearly the same: candidates by MinHash and bands, each pair checked, then clusters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import opens, shared, within
from ropewalk.clean.duplicates.jaccard import ShingleSets
from ropewalk.clean.duplicates.rows import Clusters, Rows, cluster_tables, rows_of
from ropewalk.clean.duplicates.sketch import band_hashes, bands_for, shingles_of, signatures
from ropewalk.clean.step import Joined, Parts, Texts

BAND_BYTES = 512 << 20
"""Bands read together: as many as need this much memory."""
TEXTS_AT_ONCE = 1024
HEADS = 16
"""In a group of equal bands so many texts at most are compared with all others of the group: a few thousand
texts that share a band and nothing else would cost their number squared."""


@dataclass(frozen=True)
class NearDuplicates(Joined):
    """Two texts are near duplicates where the Jaccard similarity of their sets of `words` words in a row
    (case and symbols do not count) is `threshold` or more (Broder 1997). `recall` of the pairs at the
    threshold are found, more of those above it, and no others. A cluster is what hangs together by such
    pairs; the preferred one of it stays."""

    threshold: float = 0.8
    recall: float = 0.95
    words: int = 5

    name = "near_duplicates"
    attributes: ClassVar[Mapping[str, str]] = {
        "near_duplicate_of": "number of the row kept of a cluster of near duplicates, -1 where it is this",
        "near_duplicates": "how many rows the cluster of near duplicates has",
    }

    def settings(self) -> Any:
        return {"threshold": self.threshold, "recall": self.recall, "words": self.words}

    @cached_property
    def _shape(self) -> tuple[int, int]:
        return bands_for(self.threshold, self.recall)

    def map(self, texts: Texts) -> pa.Table:
        bands, rows = self._shape
        words = texts.words.only
        hashes, document = shingles_of(words, self.words)
        found = band_hashes(signatures(hashes, document, len(texts), bands * rows), bands)
        columns = {_band(number): column for number, column in enumerate(found)}
        return pa.table({**columns, "words": words.counts.astype(np.int32)})

    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        """About 60 bytes a row and BAND_BYTES in memory; on disk 4 bytes a word of the candidates."""
        rows = rows_of(parts)
        taking_part = _filled(parts, rows)
        candidates = np.zeros(len(rows), bool)
        for members, _ in self._groups(parts, rows, taking_part):
            candidates[members] = True
        clusters = Clusters(len(rows))
        with ShingleSets(self.words) as sets:
            number = _read_sets(parts, rows, candidates, sets)
            for members, sizes in self._groups(parts, rows, taking_part):
                self._join(members, sizes, number, sets, clusters)
        yield from cluster_tables(rows, clusters, ("near_duplicate_of", "near_duplicates"))

    def _groups(
        self, parts: Parts, rows: Rows, taking_part: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each band (ranks int64 [n], sizes int64 [groups]): the texts whose band is equal, group after
        group, two or more in each, the preferred one first."""
        names = [_band(number) for number in range(self._shape[0])]
        ranks = np.flatnonzero(taking_part)
        together = max(1, BAND_BYTES // max(8 * len(rows), 1))
        for begin in range(0, len(names), together):
            columns = names[begin : begin + together]
            hashes = {name: np.empty(len(rows), np.uint64) for name in columns}
            for part in rows.parts:
                table = parts.mapped(part, columns)
                for name in columns:
                    hashes[name][rows.rank[rows.of(part)]] = table[name].to_numpy()
            for name in columns:
                yield _equal(hashes.pop(name)[ranks], ranks)

    def _join(
        self,
        members: np.ndarray,
        sizes: np.ndarray,
        number: np.ndarray,
        sets: ShingleSets,
        clusters: Clusters,
    ) -> None:
        """Compares the first of each group with the others, then the second, and so on, but for pairs that
        belong together already: the clusters are those of all similar pairs."""
        starts = np.cumsum(sizes) - sizes
        for head in range(HEADS):
            open_ = sizes > head + 1
            starts, sizes = starts[open_], sizes[open_]
            if not len(sizes):
                break
            left = np.repeat(members[starts + head], sizes - head - 1)
            right = members[np.repeat(starts + head + 1, sizes - head - 1) + within(sizes - head - 1)]
            apart = clusters.roots(left) != clusters.roots(right)
            left, right = left[apart], right[apart]
            similar = sets.similarities(number[left], number[right], self.threshold) >= self.threshold
            clusters.join(left[similar], right[similar])
            if head == 0:  # most groups are one cluster by now
                roots = clusters.roots(members[np.repeat(starts, sizes) + within(sizes)])
                first = np.cumsum(sizes) - sizes
                mixed = np.maximum.reduceat(roots, first) != np.minimum.reduceat(roots, first)
                starts, sizes = starts[mixed], sizes[mixed]


def _band(number: int) -> str:
    return f"band_{number}"


def _filled(parts: Parts, rows: Rows) -> np.ndarray:
    """[rows] bool by rank: kept, and of one word at least."""
    found = np.zeros(len(rows), bool)
    for part in rows.parts:
        here = rows.of(part)
        words = parts.mapped(part, ["words"])["words"].to_numpy()
        found[rows.rank[here]] = rows.kept[here] & (words > 0)
    return found


def _equal(hashes: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks, which rise, of hashes that are there more than once, by hash; and how many of each."""
    order = np.argsort(hashes, kind="stable")
    opening = opens(hashes[order])
    repeated = shared(opening)
    first = np.flatnonzero(opening[repeated])
    return ranks[order[repeated]], np.diff(np.append(first, repeated.sum()))


def _read_sets(parts: Parts, rows: Rows, candidates: np.ndarray, sets: ShingleSets) -> np.ndarray:
    """[rows] int64 by rank: the number of each candidate's set. Every text is read once."""
    number = np.full(len(rows), -1)
    count = 0
    for part in rows.parts:
        rank = rows.rank[rows.of(part)]
        wanted = np.flatnonzero(candidates[rank])
        for begin in range(0, len(wanted), TEXTS_AT_ONCE):
            chosen = wanted[begin : begin + TEXTS_AT_ONCE]
            sets.add(parts.texts(part, chosen))
            number[rank[chosen]] = np.arange(count, count + len(chosen))
            count += len(chosen)
    return number
