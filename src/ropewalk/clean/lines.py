"""The lines and paragraphs of many texts at once, as arrays."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ropewalk.clean.arrays import opens
from ropewalk.clean.words import Words

NEWLINE = 10


@dataclass(frozen=True)
class Lines:
    """The lines of a batch of texts in their order, ended by line feeds; all arrays are [lines].

    `starts` and `ends` int64 are characters of `words.codes`, the line feed left out; `first` and `after`
    int64 are the numbers of the first of the line's words and symbols and of the first after the line, equal
    where the line is blank.
    """

    words: Words
    document: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    after: np.ndarray

    @cached_property
    def filled(self) -> "Lines":
        """Without the blank ones."""
        return self.where(self.first < self.after)

    def where(self, keep: np.ndarray) -> "Lines":
        """Those for which `keep` [lines] bool holds."""
        parts = (a[keep] for a in (self.document, self.starts, self.ends, self.first, self.after))
        return Lines(self.words, *parts)

    def count(self, which: np.ndarray | None = None) -> np.ndarray:
        """[texts] int64: how many lines each text has, or of those for which `which` [lines] bool holds."""
        document = self.document if which is None else self.document[which]
        return np.bincount(document, minlength=self.words.texts)

    @property
    def lengths(self) -> np.ndarray:
        """int64, in characters."""
        return self.ends - self.starts

    def characters(self, which: np.ndarray | None = None) -> np.ndarray:
        """[texts] float64: how long the lines are together, or those for which `which` [lines] bool holds."""
        lengths = self.lengths if which is None else self.lengths * which
        return np.bincount(self.document, lengths, minlength=self.words.texts)

    @cached_property
    def first_character(self) -> np.ndarray:
        """uint32, of lines that are not blank: the first that is no white space."""
        return self.words.codes[self.words.starts[self.first]]

    def last_character(self, before: int = 0) -> np.ndarray:
        """uint32, of lines that are not blank: the last that is no white space, or one so many before it."""
        places = self.words.ends[self.after - 1] - 1 - before
        return self.words.codes[np.maximum(places, self.starts)]

    @cached_property
    def paragraphs(self) -> "Lines":
        """Runs of lines between blank ones, each as if it were one line."""
        filled = self.first < self.after
        same = filled[1:] & filled[:-1] & (self.document[1:] == self.document[:-1])
        opens, closes = filled.copy(), filled.copy()
        opens[1:] &= ~same
        closes[:-1] &= ~same
        return Lines(
            self.words,
            self.document[opens],
            self.starts[opens],
            self.ends[closes],
            self.first[opens],
            self.after[closes],
        )

    @cached_property
    def repeated(self) -> np.ndarray:
        """bool: the same, letter by letter, is earlier in the same text."""
        hashes = self.words.hashes_between(self.starts, self.ends)
        order = np.lexsort((hashes, self.document))  # stable: the earlier first
        result = np.empty(len(hashes), bool)
        result[order] = ~opens(hashes[order], self.document[order])
        return result


def lines_of(words: Words) -> Lines:
    """A text that ends with a line feed has no empty line after it; an empty text has no line."""
    codes, begins = words.codes, words.begins
    starts = np.sort(np.concatenate([begins, np.flatnonzero(codes == NEWLINE) + 1]))
    starts = starts[(starts < len(codes)) & (np.diff(starts, prepend=-1) > 0)]
    ends = np.append(starts[1:], len(codes))[: len(starts)]
    first = np.searchsorted(words.starts, starts)
    after = np.searchsorted(words.starts, ends)
    document = np.searchsorted(begins, starts, side="right") - 1
    return Lines(words, document, starts, ends - (codes[ends - 1] == NEWLINE), first, after)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole as float64; 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def any_of(codes: np.ndarray, characters: str) -> np.ndarray:
    """Bool, of the shape of `codes`: which of them is one of the characters."""
    return np.isin(codes, np.array([ord(c) for c in characters], np.uint32))
