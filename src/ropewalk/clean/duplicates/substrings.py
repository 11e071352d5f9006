"""Runs of words that stand somewhere before, word by word: quotations, boilerplate inside of paragraphs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import within
from ropewalk.clean.duplicates.places import PlaceSet, flat, lengths, orders_of, span_table
from ropewalk.clean.duplicates.rows import Rows, rows_of
from ropewalk.clean.duplicates.spill import Spill
from ropewalk.clean.step import Joined, Parts, Texts
from ropewalk.clean.words import Words, mix, words_of

TEXTS_AT_ONCE = 1024
_OTHER = np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class DuplicateSubstrings(Joined):
    """Runs of `words` words in a row (case and symbols do not count) that are in a preferred text, or earlier
    in the same one without overlapping, too. The spans are these runs joined where they meet; the first
    occurrence stays. Runs are equal where 128 bits of hashes of their words are.

    Not all runs are compared. `map` samples shorter ones by winnowing (Schleimer, Wilkerson, Aiken 2003): of
    each so many neighbours the one with the lowest hash, and those equal to it. Two equal runs of `words`
    words have the same samples in the same places. `reduce` looks only around samples that are there twice.
    """

    words: int = 50

    name = "repeated_passages"
    attributes: ClassVar[Mapping[str, str]] = {
        "repeated_passages": "spans: runs of words that are in a preferred or earlier place too",
        "repeated_passages_characters": "length of these spans together, in characters",
    }

    def settings(self) -> Any:
        return {"words": self.words}

    @property
    def _sample(self) -> int:
        """Words of a sample. Half: longer ones are more, shorter ones more often alike by accident."""
        return max(1, self.words // 2)

    def map(self, texts: Texts) -> pa.Table:
        words = texts.words.only
        first, hashes = _winnowed(words, self.words, self._sample)
        document = words.document[first]
        counts = np.bincount(document, minlength=len(texts))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        place = pa.array((first - words.offsets[document]).astype(np.int32))
        return pa.table(
            {
                "sample": pa.ListArray.from_arrays(offsets, pa.array(hashes)),
                "place": pa.ListArray.from_arrays(offsets, place),
                "words": words.counts,
            }
        )

    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        """A bit for each word in memory; on disk 24 bytes for each sample (one in words / 4 words), then for
        each run around the repeated ones: less than the text unless most of it is repeated."""
        rows = rows_of(parts)
        counts = np.concatenate(
            [
                np.empty(0, np.int64),
                *(parts.mapped(part, ["words"])["words"].to_numpy() for part in rows.parts),
            ]
        )
        repeated, later = PlaceSet(rows, counts), PlaceSet(rows, counts)
        with Spill() as spill:
            for part in rows.parts:
                _add_samples(parts, rows, part, spill)
            for orders, _ in spill.groups():
                repeated.add(orders)
        with Spill() as spill:
            for part in rows.parts:
                self._add_runs(parts, rows, part, repeated, spill)
            del repeated
            for orders, preferred in spill.groups():
                # in one text they are this far apart in words; between texts much farther
                later.add(orders[orders - preferred >= self.words])
        for part in rows.parts:
            yield self._spans(parts, rows, part, later)

    def _add_runs(self, parts: Parts, rows: Rows, part: int, repeated: PlaceSet, spill: Spill) -> None:
        """All runs of `words` words of a part that hold a repeated sample."""
        margin = self.words - self._sample
        for chosen, words, at in _read(parts, rows, part, repeated):
            # a run that begins at most `margin` words before a sample holds it
            change = np.zeros(len(words) + 1, np.int64)
            np.add.at(change, np.maximum(at - margin, words.offsets[words.document[at]]), 1)
            np.add.at(change, at + 1, -1)
            wanted = np.cumsum(change[:-1]) > 0
            key, first = words.ngrams(self.words)
            check, _ = replace(words, hashes=mix(words.hashes ^ _OTHER)).ngrams(self.words)
            taken = wanted[first]
            first = first[taken]
            document = words.document[first]
            orders = orders_of(rows.rank[rows.of(part)][chosen[document]], first - words.offsets[document])
            spill.add(key[taken], check[taken], orders)

    def _spans(self, parts: Parts, rows: Rows, part: int, later: PlaceSet) -> pa.Table:
        documents, starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for chosen, words, begins in _read(parts, rows, part, later):
            # runs that overlap or meet are one
            apart = np.append(True, np.diff(begins) > self.words)
            apart[1:] |= np.diff(words.document[begins]) > 0
            first = begins[apart]
            last = begins[np.append(apart[1:], True)] + self.words - 1
            document = words.document[first]
            documents.append(chosen[document])
            starts.append(words.starts[first] - words.begins[document])
            ends.append(words.ends[last] - words.begins[document])
        return span_table(self.name, parts.sizes[part], *map(np.concatenate, (documents, starts, ends)))


def _winnowed(words: Words, run: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(number of the first word int64, hash uint64) of runs of `sample` words that are the lowest of all in
    some run of `run` words."""
    hashes, first = words.ngrams(sample)
    width = run - sample + 1
    if len(hashes) < width:
        return first[:0], hashes[:0]
    document = words.document[first]
    lowest = _sliding(np.minimum, hashes, width)
    lowest[document[: len(lowest)] != document[width - 1 :]] = 0  # not in one text
    padding = np.zeros(width - 1, np.uint64)
    # the highest of the lowest of all windows around a place is at most its own hash
    taken = _sliding(np.maximum, np.concatenate([padding, lowest, padding]), width) == hashes
    return first[taken], hashes[taken]


def _sliding(function: np.ufunc, values: np.ndarray, width: int) -> np.ndarray:
    """[n - width + 1]: the minimum or maximum of each `width` neighbours, by doubling."""
    done = 1
    while done < width:
        step = min(done, width - done)
        values = function(values[:-step], values[step:])
        done += step
    return values


def _add_samples(parts: Parts, rows: Rows, part: int, spill: Spill) -> None:
    table = parts.mapped(part, ["sample", "place"])
    many = lengths(table["sample"])
    here = rows.of(part)
    kept = np.repeat(rows.kept[here], many)
    orders = orders_of(np.repeat(rows.rank[here], many), flat(table["place"]).astype(np.int64))[kept]
    spill.add(flat(table["sample"])[kept], np.zeros(len(orders), np.uint64), orders)


def _read(
    parts: Parts, rows: Rows, part: int, places: PlaceSet
) -> Iterator[tuple[np.ndarray, Words, np.ndarray]]:
    """(rows of the part, their words, numbers of the words in `places`) of texts that have some of these."""
    here, counts = rows.of(part), parts.mapped(part, ["words"])["words"].to_numpy()
    found, offsets = places.of(here), np.cumsum(counts) - counts
    wanted = np.unique(np.searchsorted(offsets + counts, np.flatnonzero(found), side="right"))
    for begin in range(0, len(wanted), TEXTS_AT_ONCE):
        chosen = wanted[begin : begin + TEXTS_AT_ONCE]
        words = words_of(parts.texts(part, chosen)).only
        places_here = np.repeat(offsets[chosen], counts[chosen]) + within(counts[chosen])
        yield chosen, words, np.flatnonzero(found[places_here])
