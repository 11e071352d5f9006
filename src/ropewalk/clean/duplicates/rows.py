"""All rows of the data at once: which take part, which of two equals stays, and what belongs together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import Parts


@dataclass(frozen=True)
class Rows:
    """Rows are numbered through all parts. `offsets` int64 [parts + 1] is where each part begins; `kept` bool
    [rows] says which take part; `rank` int64 [rows] is 0 for the row that is preferred to all, and so on;
    `row_of` int64 [rows] is its inverse. About 25 bytes a row."""

    offsets: np.ndarray
    kept: np.ndarray
    rank: np.ndarray
    row_of: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def of(self, part: int) -> slice:
        return slice(int(self.offsets[part]), int(self.offsets[part + 1]))

    @property
    def parts(self) -> range:
        return range(len(self.offsets) - 1)


def rows_of(parts: Parts) -> Rows:
    """Asks every part what is kept and what is preferred."""
    count = len(parts.sizes)
    offsets = np.concatenate([[0], np.cumsum(parts.sizes, dtype=np.int64)]).astype(np.int64)
    kept = [parts.kept(part) for part in range(count)]
    preference = [parts.preference(part) for part in range(count)]
    row_of = np.argsort(np.concatenate([np.empty(0), *preference]), kind="stable")
    rank = np.empty_like(row_of)
    rank[row_of] = np.arange(len(rank))
    return Rows(offsets, np.concatenate([np.empty(0, bool), *kept]), rank, row_of)


class Clusters:
    """Union-find over the numbers below `size`; the smallest of a cluster stands for it."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def roots(self, members: np.ndarray) -> np.ndarray:
        """[n] int64: the smallest of each one's cluster."""
        found = self._parent[members]
        while True:
            above = self._parent[found]
            if (above == found).all():
                break
            found = above
        self._parent[members] = found
        return found

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """left[i] and right[i] are in one cluster from now on, for all i."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            apart = left != right
            left, right = left[apart], right[apart]
            # of several that want one root the smallest wins; the others come again
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))


def cluster_tables(rows: Rows, clusters: Clusters, names: tuple[str, str]) -> Iterator[pa.Table]:
    """For each part a table of two columns: the row that is kept instead (int64, -1 where the row itself is)
    and how many rows the cluster has. `clusters` are over ranks."""
    roots = clusters.roots(np.arange(len(rows)))
    sizes = np.bincount(roots, minlength=len(rows))
    for part in rows.parts:
        rank = rows.rank[rows.of(part)]
        root = roots[rank]
        instead = np.where(root == rank, -1, rows.row_of[root])
        yield pa.table(dict(zip(names, (instead, sizes[root]), strict=True)))
