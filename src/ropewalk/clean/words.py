"""The words of many texts at once, as arrays: what rules, shingles and n-grams are all made of.

A word is a run of letters, digits and marks; an ideograph, a kana or a letter of a script that is written
without spaces (Thai, Lao, Khmer, Burmese) is a word by itself. A run of anything else but white space is a
symbol. Case is folded letter by letter, so that places in the folded text are places in the text.
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import numpy as np

SPACE, WORD, SINGLE, SYMBOL = range(4)
_KIND = 24
"""bit of the table from which on the kind stands; below it is the folded character"""
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_STEP = np.uint64(0xD1342543DE82EF95)
_BLOCK = 1 << 16
"""Characters looked at together: what is made of them stays in the processor's cache."""
_SINGLE_RANGES = (  # Unicode blocks
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Words and symbols of a batch of texts in their order: all arrays are [n].

    `document` int64 is the text's number; `starts` and `ends` int64 are characters of `codes`, all texts one
    after the other; `hashes` uint64 are equal for equal words, whatever their case; `symbol` bool.
    `begins` [texts + 1] int64 is where each text begins in `codes`.
    """

    codes: np.ndarray
    begins: np.ndarray
    document: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    symbol: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def texts(self) -> int:
        return len(self.begins) - 1

    @cached_property
    def only(self) -> "Words":
        """Without the symbols."""
        return self.where(~self.symbol)

    def where(self, keep: np.ndarray) -> "Words":
        """Those for which `keep` [n] bool holds."""
        parts = (a[keep] for a in (self.document, self.starts, self.ends, self.hashes, self.symbol))
        return Words(self.codes, self.begins, *parts)

    @cached_property
    def counts(self) -> np.ndarray:
        """[texts] int64: how many each text has."""
        return np.bincount(self.document, minlength=self.texts)

    @cached_property
    def offsets(self) -> np.ndarray:
        """[texts + 1] int64: the words of text i are those from offsets[i] to offsets[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def hashes_between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[m] uint64, of the characters `codes[starts[i]:ends[i]]` as they are, not folded. `starts` ascend,
        and each lies in one text with its end."""
        cuts = self.begins[_cuts(self.begins)]
        edges = np.searchsorted(starts, cuts)
        edges[-1] = len(starts)
        parts = []
        for (first, last), (i, j) in zip(pairwise(cuts.tolist()), pairwise(edges.tolist()), strict=True):
            parts.append(_hashes(self.codes[first:last], starts[i:j] - first, ends[i:j] - first))
        return np.concatenate(parts)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes uint64, number of the first word int64) of all runs of n words that lie in one text."""
        if len(self) < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        size = len(self) - n + 1
        rolled = np.zeros(size, np.uint64)
        for k in range(n):
            rolled *= _STEP
            rolled += self.hashes[k : k + size]
        first = np.flatnonzero(self.document[:size] == self.document[n - 1 :])
        return mix(rolled[first]), first

    def find(self, phrase: str) -> np.ndarray:
        """Numbers of the words with which the phrase begins, whatever the case and the white space. Symbols
        in it or between its words must be those of the phrase."""
        wanted = hashes_of(phrase)
        found = np.flatnonzero(self.hashes == wanted[0])
        found = found[found + len(wanted) <= len(self)]
        for place, value in enumerate(wanted[1:], 1):
            found = found[self.hashes[found + place] == value]
        return found[self.document[found] == self.document[found + len(wanted) - 1]]

    def texts_with(self, which: np.ndarray) -> np.ndarray:
        """[texts] bool: the text has some of these words; `which` is what chooses them of [n]."""
        found = np.zeros(self.texts, bool)
        found[self.document[which]] = True
        return found


def words_of(texts: Sequence[str]) -> Words:
    """Case folded, all texts at once: about 100 MB of text a second. Lone surrogates count as symbols."""
    begins = np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)])
    codes = np.empty(begins[-1], np.uint32)
    parts = []
    for a, b in pairwise(_cuts(begins).tolist()):
        first, last = begins[a], begins[b]
        encoded = "".join(texts[a:b]).encode("utf-32-le", "surrogatepass")
        codes[first:last] = np.frombuffer(encoded, np.uint32)
        starts, ends, hashes, symbol = _block(codes[first:last], begins[a : b + 1] - first)
        parts.append((starts + first, ends + first, hashes, symbol))
    starts, ends, hashes, symbol = (np.concatenate(part) for part in zip(*parts, strict=True))
    document = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(starts, begins)))
    return Words(codes, begins, document, starts, ends, hashes, symbol)


@cache
def hashes_of(text: str) -> np.ndarray:
    """[n] uint64, of the words and symbols of a constant text. Kept, and not to be changed."""
    return words_of([text]).hashes


def _cuts(begins: np.ndarray) -> np.ndarray:
    """Numbers of the texts at which blocks begin, and the number of texts: at least one block."""
    cuts = [0]
    while len(cuts) == 1 or cuts[-1] < len(begins) - 1:
        last = int(np.searchsorted(begins, begins[cuts[-1]] + _BLOCK, side="right")) - 1
        cuts.append(min(max(last, cuts[-1] + 1), len(begins) - 1))
    return np.array(cuts)


def _block(codes: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, hashes, symbol) of the words of some texts."""
    found = _table().take(codes, mode="clip")  # clip asks less than the check of every index
    kind = (found >> _KIND).astype(np.uint8)
    # A word begins where the kind changes, at every single, and at every text's beginning.
    edge = np.ones(len(codes) + 1, bool)
    np.not_equal(kind[1:], kind[:-1], out=edge[1 : len(codes)])
    edge[:-1] |= kind == SINGLE
    edge[begins] = True
    filled = kind != SPACE
    starts = np.flatnonzero(edge[:-1] & filled)
    ends = np.flatnonzero(edge[1:] & filled) + 1
    found &= (1 << _KIND) - 1
    hashes = _hashes(found, starts, ends)
    return starts, ends, hashes, kind.take(starts) == SYMBOL


def _hashes(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of the codes from starts[i] to ends[i]: sum of code * base^place modulo 2^64, mixed. By differences of
    one running sum, divided by the base's power (the base is odd, so that it has an inverse)."""
    powers, inverses = _powers(1 << max(len(codes) - 1, 1).bit_length())
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    return mix((sums.take(ends) - sums.take(starts)) * inverses.take(starts))


@cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """base^0 .. base^(size-1) and the same of its inverse."""
    results = []
    for base in (_BASE, _INVERSE):
        powers = np.full(size, base, np.uint64)
        powers[0] = 1
        results.append(np.cumprod(powers, dtype=np.uint64))
    return results[0], results[1]


def mix(x: np.ndarray) -> np.ndarray:
    """[n] uint64 to [n] uint64, one to one, every bit of the result from every bit of x: the finalizer of
    splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def _table() -> np.ndarray:
    """uint32 of every character: its kind, and itself folded."""
    kinds = np.full(sys.maxunicode + 1, SYMBOL, np.uint8)
    folded = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(0x20000):  # above are ideographs, tags and what is unassigned
        character = chr(code)
        if character.isspace():
            kinds[code] = SPACE
        elif unicodedata.category(character)[0] in "LNM":
            kinds[code] = WORD
            lower = character.lower()
            folded[code] = ord(lower) if len(lower) == 1 else code
    for first, last in _SINGLE_RANGES:
        part = kinds[first : last + 1]
        part[part == WORD] = SINGLE
    kinds[0x20000:0x40000] = SINGLE
    return folded | kinds.astype(np.uint32) << _KIND
