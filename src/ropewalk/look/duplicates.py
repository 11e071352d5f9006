"""Which documents are there more than once, by the hash of the content and by what a step has found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ropewalk.clean.arrays import opens
from ropewalk.data.view import View

SHOWN = 5
"""Clusters that are shown, and documents of each."""


@dataclass(frozen=True)
class Duplicates:
    """All arrays are [documents], over the whole data in its order: 26 bytes a document."""

    hashes: np.ndarray
    kept: np.ndarray
    held_out: np.ndarray
    duplicate_of: np.ndarray
    """number of the document kept in its stead, else -1"""
    again: np.ndarray
    """kept for training, though an earlier one that is kept is the same"""

    @classmethod
    def of(cls, view: View) -> "Duplicates":
        names = ("hash", "kept", "duplicate_of")
        tables = [
            view.table(i, [*names, *(("split",) if view.folder else ())]) for i in range(len(view.parts))
        ]
        hashes, kept, of = (
            np.concatenate([table[name].to_numpy(zero_copy_only=False) for table in tables]) for name in names
        )
        if view.folder:
            held_out = np.concatenate(
                [table["split"].to_numpy(zero_copy_only=False) == "validation" for table in tables]
            )
        else:
            held_out = np.repeat([part.held_out for part in view.parts], view.sizes)
        candidates = np.flatnonzero(kept & ~held_out)
        again = np.zeros(len(hashes), bool)
        again[candidates] = True
        again[candidates[np.unique(hashes[candidates], return_index=True)[1]]] = False
        return cls(hashes, kept.astype(bool), held_out, of, again)

    def by_part(self, view: View, which: np.ndarray) -> list[int]:
        """How many of `which` [documents] bool are in each part."""
        ends = np.concatenate([[0], np.cumsum(which)])
        return np.diff(ends[view.begins]).tolist()

    def leaked(self) -> int:
        """Documents of validation that are also in training."""
        training = np.unique(self.hashes[self.kept & ~self.held_out])
        return int(np.isin(self.hashes[self.kept & self.held_out], training).sum())

    def clusters(self) -> list[dict[str, Any]]:
        """The biggest: {exact, documents, kept, numbers: of some, the one that is kept first}."""
        found = _groups(self.hashes, np.arange(len(self.hashes)), exact=True)
        pointing = np.flatnonzero(self.duplicate_of >= 0)
        if len(pointing):  # what a step has found has the exact ones in it
            leader = self.duplicate_of[pointing]
            leaders = np.unique(leader)
            found = _groups(
                np.concatenate([leaders, leader]), np.concatenate([leaders, pointing]), exact=False
            )
        for cluster in found:
            cluster["kept"] = int(self.kept[cluster.pop("all")].sum())
        return found


def _groups(keys: np.ndarray, numbers: np.ndarray, exact: bool) -> list[dict[str, Any]]:
    """Equal keys together, the largest groups first; their members in the order of `numbers` [n]."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(opens(keys[order]))
    sizes = np.diff(np.append(starts, len(keys)))
    big = [i for i in np.lexsort((starts, -sizes))[:SHOWN].tolist() if sizes[i] > 1]
    members: Sequence[np.ndarray] = [numbers[order[starts[i] : starts[i] + sizes[i]]] for i in big]
    return [
        {"exact": exact, "documents": len(all), "all": all, "numbers": all[:3].tolist()} for all in members
    ]
