"""Equal hashes among more than memory holds: written to disk by their first byte, read back in passes."""

import tempfile
from collections.abc import Iterator

import numpy as np

from ropewalk.clean.arrays import opens, shared

ENTRY = np.dtype([("key", np.uint64), ("check", np.uint64), ("order", np.int64)])
PASSES = 256


class Spill:
    """Hashes of 128 bits (`key`, `check`), each with an int64 of its own that says where it was and in what
    order the equal ones come. 24 bytes each in a file without a name (under TMPDIR), a 256th of it in memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._bounds: list[np.ndarray] = []

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: np.ndarray, check: np.ndarray, order: np.ndarray) -> None:
        """[n] each, as many as there are at a time: every call is one more piece to be read in each pass."""
        if not len(key):
            return
        of_pass = (key >> np.uint64(56)).astype(np.uint8)
        sorted_by_pass = np.argsort(of_pass, kind="stable")  # a radix sort, the type being small
        entries = np.empty(len(key), ENTRY)
        for name, values in (("key", key), ("check", check), ("order", order)):
            entries[name] = values[sorted_by_pass]
        begin = self._file.seek(0, 2)
        self._file.write(entries.view(np.uint8).data)
        counts = np.concatenate([[0], np.cumsum(np.bincount(of_pass, minlength=PASSES))])
        self._bounds.append(begin + counts * ENTRY.itemsize)

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(order int64 [n], first int64 [n]) of all hashes that were added more than once, group after group
        and in each in rising order; first[i] is the lowest of i's group."""
        for number in range(PASSES):
            entries = self._read(number)
            by_key = np.argsort(entries["key"])  # most are there once, and are spared the slower sort
            twice = np.empty(len(entries), bool)
            twice[by_key] = shared(opens(entries["key"][by_key]))
            entries = entries[twice]
            entries = entries[np.lexsort((entries["order"], entries["check"], entries["key"]))]
            opening = opens(entries["key"], entries["check"])
            first = np.flatnonzero(opening)[np.cumsum(opening) - 1]
            order, repeated = entries["order"], shared(opening)
            if len(order):
                yield order[repeated], order[first][repeated]

    def _read(self, number: int) -> np.ndarray:
        pieces = []
        for bounds in self._bounds:
            self._file.seek(int(bounds[number]))
            pieces.append(self._file.read(int(bounds[number + 1] - bounds[number])))
        return np.frombuffer(b"".join(pieces), ENTRY)
