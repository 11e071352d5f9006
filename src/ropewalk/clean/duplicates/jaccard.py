"""The true Jaccard similarity of pairs of texts, from their sets of shingles."""

import tempfile
from collections.abc import Iterator

import numpy as np

from ropewalk.clean.arrays import opens, within
from ropewalk.clean.duplicates.sketch import shingles_of
from ropewalk.clean.words import words_of

AT_ONCE = 1 << 21
"""Shingles of pairs looked at together: some 50 MB."""
_LOW = np.uint64(0xFFFFFFFF)


class ShingleSets:
    """Sets of 32-bit hashes in a file without a name (under TMPDIR), 4 bytes a shingle; 8 bytes a set in
    memory. Two sets of 10,000 shingles have 0.02 of them in common by accident."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._sizes: list[np.ndarray] = []
        self._sealed: tuple[np.ndarray, np.ndarray] | None = None

    def __enter__(self) -> "ShingleSets":
        return self

    def __exit__(self, *_: object) -> None:
        self._sealed = None
        self._file.close()

    def add(self, texts: list[str]) -> None:
        """The sets of these texts are the next ones."""
        hashes, document = shingles_of(words_of(texts).only, self._words)
        keys = (document.astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32))
        keys.sort()
        keys = keys[opens(keys)]
        self._file.seek(0, 2)
        self._file.write((keys & _LOW).astype(np.uint32).data)
        counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
        self._sizes.append(counts)
        self._sealed = None

    def similarities(self, left: np.ndarray, right: np.ndarray, threshold: float) -> np.ndarray:
        """[n] float64: |A and B| / |A or B| of sets left[i] and right[i], 0 where their sizes alone say
        that it is below the threshold."""
        offsets, _ = self._seal()
        sizes = np.stack([offsets[left + 1] - offsets[left], offsets[right + 1] - offsets[right]])
        found = np.zeros(len(left))
        possible = np.flatnonzero(sizes.min(axis=0) >= threshold * sizes.max(axis=0))
        for chosen in _chunks(possible, sizes[:, possible].sum(axis=0)):
            common = self._common(left[chosen], right[chosen])
            found[chosen] = common / np.maximum(sizes[:, chosen].sum(axis=0) - common, 1)
        return found

    def _common(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        keys = np.concatenate([self._keys(left), self._keys(right)])
        keys.sort()
        pair = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
        return np.bincount(pair.astype(np.int64), minlength=len(left))

    def _keys(self, sets: np.ndarray) -> np.ndarray:
        """Number of the place in `sets`, then the shingle's hash."""
        offsets, hashes = self._seal()
        counts = offsets[sets + 1] - offsets[sets]
        values = hashes[np.repeat(offsets[sets], counts) + within(counts)]
        return (np.repeat(np.arange(len(sets), dtype=np.uint64), counts) << np.uint64(32)) | values

    def _seal(self) -> tuple[np.ndarray, np.ndarray]:
        if self._sealed is None:
            offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *self._sizes]))])
            self._file.flush()
            # an empty file cannot be mapped
            mapped = np.memmap(self._file, np.uint32, "r") if offsets[-1] else np.empty(0, np.uint32)
            self._sealed = offsets, mapped
        return self._sealed


def _chunks(chosen: np.ndarray, costs: np.ndarray) -> Iterator[np.ndarray]:
    """`chosen` in pieces that cost about AT_ONCE."""
    piece = np.cumsum(costs) // AT_ONCE
    yield from np.split(chosen, np.flatnonzero(np.diff(piece)) + 1)
