"""Places in texts (their lines, their words) as one number each, sets of them, and spans as Arrow columns."""

import numpy as np
import pyarrow as pa

from ropewalk.clean.duplicates.rows import Rows
from ropewalk.clean.step import spans_of

PLACE_BITS = 28
"""A text has fewer places than this (2.7e8 lines or words), and there are fewer than 2^35 texts."""


def orders_of(ranks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[n] int64, in the order of preference of the texts and then of the places in them."""
    return (ranks << PLACE_BITS) | places


class PlaceSet:
    """Places found in all texts: a bit for each place there is, and 8 bytes a text. Row i has counts[i] int64
    places."""

    def __init__(self, rows: Rows, counts: np.ndarray) -> None:
        self._row_of = rows.row_of
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._bits = np.zeros(int(self._offsets[-1]) // 8 + 1, np.uint8)

    def add(self, orders: np.ndarray) -> None:
        """[n] int64 as of `orders_of`."""
        rank, place = orders >> PLACE_BITS, orders & ((1 << PLACE_BITS) - 1)
        bit = self._offsets[self._row_of[rank]] + place
        np.bitwise_or.at(self._bits, bit >> 3, (1 << (bit & 7)).astype(np.uint8))

    def of(self, rows: slice) -> np.ndarray:
        """[places of these rows] bool, row after row."""
        begin, end = int(self._offsets[rows.start]), int(self._offsets[rows.stop])
        bits = np.unpackbits(self._bits[begin >> 3 : (end >> 3) + 1], bitorder="little")
        return bits[begin & 7 :][: end - begin].astype(bool)


def span_table(name: str, texts: int, document: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> pa.Table:
    """Of so many texts: SPANS `name`, of that kind, and int64 `name_characters`, their length together.
    document [n] rises, and starts [n] with it in each."""
    spans = spans_of(texts, document, starts, ends, np.zeros(len(starts), np.int32), [name])
    length = np.bincount(document, ends - starts, texts).astype(np.int64)
    return pa.table({name: spans, f"{name}_characters": length})


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """The values of all lists of a column."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def lengths(column: pa.ChunkedArray) -> np.ndarray:
    """[n] int64, of the lists of a column."""
    return column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
