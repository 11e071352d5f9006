"""Which lengths share a row: best-fit decreasing, on counts of equal lengths instead of on documents.

Documents of one length are interchangeable here, and rows with the same room left are too. So the work
is in the number of different (length, room) meetings, not of documents: a million documents take about a
second. Which document takes which place is decided later (see loader.py), anew in every epoch.
"""

from typing import Literal, NamedTuple

import numpy as np

PackingName = Literal["best_fit", "none", "concat"]
"""concat needs no packing: rows are cut from the documents laid end to end (order.py)."""

Pattern = tuple["Pattern", int, int] | None
"""What a row holds: (what it held before, length, how many of it were added)."""


class Rows(NamedTuple):
    """`lengths` of the places of all rows, one after the other; row i has those from starts[i] on."""

    lengths: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def pack(lengths: np.ndarray, capacity: int, packing: Literal["best_fit", "none"] = "best_fit") -> Rows:
    """Rows of at most `capacity` tokens for documents of `lengths`; every length is placed exactly once.

    best_fit: the longest first, each into the row where it leaves the least room (best-fit decreasing;
    at most 11/9 of the fewest rows possible, D. S. Johnson 1973). none: a row for each.
    Raises ValueError for a length that is not in 1 .. capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}; must be from 1 to {capacity}")
    if packing == "none" or not len(lengths):
        return Rows(np.sort(lengths)[::-1], np.arange(len(lengths) + 1))
    return _expand(_best_fit(np.bincount(lengths), capacity))


def rows_needed(lengths: np.ndarray, capacity: int) -> dict[str, int]:
    """Rows of an epoch by packing; only concat has room for documents longer than a row."""
    fits = not len(lengths) or lengths.max() <= capacity
    rows = {name: len(pack(lengths, capacity, name)) for name in ("best_fit", "none")} if fits else {}
    return {**rows, "concat": -(-int(lengths.sum()) // capacity)}


def _best_fit(counts: np.ndarray, capacity: int) -> list[tuple[int, Pattern]]:
    """(number of rows, what each of them holds), for `counts[length]` documents of each length."""
    rooms: dict[int, list[tuple[int, Pattern]]] = {}
    occupied = 0  # bit r is set where there are rows with room r: the best fit is found by its lowest bit

    def put(room: int, rows: int, pattern: Pattern) -> None:
        nonlocal occupied
        rooms.setdefault(room, []).append((rows, pattern))
        occupied |= 1 << room

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows, pattern = rooms[room].pop()
                if not rooms[room]:
                    occupied ^= 1 << room
            else:
                room, rows, pattern = capacity, left, None
            # A row that took one is the best fit for the next of this length, until it has no room for it.
            each = room // length
            full = min(rows, left // each)
            if full:
                put(room - each * length, full, (pattern, length, each))
            left -= full * each
            rows -= full
            if left and rows:
                put(room - left * length, 1, (pattern, length, left))
                left, rows = 0, rows - 1
            if rows and pattern is not None:
                put(room, rows, pattern)
    return [group for room in sorted(rooms) for group in rooms[room]]


def _expand(groups: list[tuple[int, Pattern]]) -> Rows:
    lengths, counts = [], []
    for rows, pattern in groups:
        held: list[int] = []
        while pattern is not None:
            pattern, length, number = pattern
            held += [length] * number
        lengths.append(np.tile(np.array(held[::-1], dtype=np.int64), rows))
        counts.append(np.full(rows, len(held), dtype=np.int64))
    return Rows(np.concatenate(lengths), np.concatenate([[0], np.cumsum(np.concatenate(counts))]))
