"""Which n-grams belong to which questions, and where they stand in a batch of texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ropewalk.clean.arrays import opens, within
from ropewalk.clean.words import Words, mix

LONG = 13
"""Words of an n-gram of a long question (Brown et al. 2020, arXiv:2005.14165, appendix C)."""
SHORTEST = 4
"""Words of the shortest question that is looked for."""
_MIDDLE = 8
BOILERPLATE = 3
"""An n-gram of more different questions than so many says nothing of any of them."""


@dataclass(frozen=True)
class Hits:
    """N-grams of questions found in a batch, all arrays [n] int64: the number of the text's word at which it
    begins, the question's number, and which of all n-grams it is. In no order."""

    first: np.ndarray
    question: np.ndarray
    gram: np.ndarray


class Index:
    """Questions, as sequences of words, by their n-grams: of 13 words, or the whole of a shorter question.

    The 4 words that begin at each place of a text are looked up in a table of bits; what passes is made
    longer, word by word, and looked up again, so that most of a text costs one look.
    """

    def __init__(self, questions: Sequence[np.ndarray]) -> None:
        """`questions` are different ones: hashes [words] uint64, of at least `SHORTEST` words each."""
        self.words = np.array([len(q) for q in questions], np.int64)
        length = np.minimum(self.words, LONG)
        counts = self.words - length + 1
        question = np.repeat(np.arange(len(questions)), counts)
        words = _as_words(questions)
        keys, first = words.ngrams(SHORTEST)
        at = words.offsets[question] + within(counts)
        whole = np.empty(len(at), np.uint64)
        prefixes = {}
        for n, key in _longer(keys[np.searchsorted(first, at)], words.hashes, at, length[question]):
            if n in (SHORTEST, _MIDDLE):
                prefixes[n] = key[length[question] >= n]
            whole[length[question] == n] = key[length[question] == n]
        self._lengths = set(length.tolist())
        self._own(whole, question, _telling(whole, question, at, length[question], len(words)))
        self._tables = {n: _Table(prefix) for n, prefix in prefixes.items()}
        self._table = _Table(self._keys)

    def _own(self, whole: np.ndarray, question: np.ndarray, telling: np.ndarray) -> None:
        """Keeps each n-gram that counts once, with the questions that have it."""
        questions = len(self.words)
        self.boilerplate = np.bincount(question[telling], minlength=questions) == 0
        """[questions] bool: nothing in it is its own, so that finding it says little."""
        kept = telling | self.boilerplate[question]
        whole, question = whole[kept], question[kept]
        order = np.lexsort((question, whole))
        whole, question = whole[order], question[order]
        new = opens(whole, question)
        self._question = question[new]
        self.grams = np.bincount(self._question, minlength=questions)
        """[questions] int64: different n-grams that count."""
        self._keys, often = np.unique(whole[new], return_counts=True)
        self._offsets = np.concatenate([[0], np.cumsum(often)])

    def find(self, words: Words) -> Hits:
        """Every n-gram of a question in `words`, which are without symbols."""
        none = np.empty(0, np.int64)
        if not len(self._keys):
            return Hits(none, none, none)
        keys, first = words.ngrams(SHORTEST)
        passed = self._tables[SHORTEST].may_have(keys)
        keys, first = keys[passed], first[passed]
        found = [(none, none)]
        room = words.offsets[1:][words.document[first]] - first
        for n, key in _longer(keys, words.hashes, first, room):
            alive = room >= n
            if n == _MIDDLE and n in self._tables:
                alive &= self._tables[n].may_have(key)
                room[~alive] = 0
            if n in self._lengths:
                alive &= self._table.may_have(key)
                gram = np.minimum(np.searchsorted(self._keys, key[alive]), len(self._keys) - 1)
                equal = self._keys[gram] == key[alive]
                found.append((first[alive][equal], gram[equal]))
        places, gram = (np.concatenate(column) for column in zip(*found, strict=True))
        counts = np.diff(self._offsets)[gram]
        places, gram = np.repeat(places, counts), np.repeat(gram, counts)
        return Hits(places, self._question[self._offsets[gram] + within(counts)], gram)


def _telling(
    whole: np.ndarray, question: np.ndarray, at: np.ndarray, length: np.ndarray, words: int
) -> np.ndarray:
    """[n] bool: which n-grams tell their question from others. Not boilerplate, and not what begins or ends
    in it, so that a question counts as found without the instruction before it; unless nothing else is left.

    An n-gram is `length` words from word `at` on, of `question`; there are `words` in all.
    """
    order = np.lexsort((question, whole))
    new = opens(whole[order], question[order])
    keys, often = np.unique(whole[order][new], return_counts=True)
    common = often[np.searchsorted(keys, whole)] > BOILERPLATE
    edges = np.zeros(words + 1, np.int64)
    np.add.at(edges, at[common], 1)
    np.add.at(edges, (at + length)[common], -1)
    covered = np.cumsum(edges) > 0
    apart = ~common & ~covered[at] & ~covered[at + length - 1]
    some = np.zeros(int(question.max(initial=-1)) + 1, bool)
    some[question[apart]] = True
    return apart | (~common & ~some[question])


def _longer(
    keys: np.ndarray, hashes: np.ndarray, first: np.ndarray, room: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(n, keys of the n words from `first` on) for n from SHORTEST to LONG; right where `room` >= n."""
    yield SHORTEST, keys
    last = len(hashes) - 1
    for n in range(SHORTEST + 1, LONG + 1):
        keys = mix(keys + hashes[np.minimum(first + n - 1, last)])
        yield n, keys


def _as_words(questions: Sequence[np.ndarray]) -> Words:
    """Sequences of hashes as texts of nothing but these words."""
    counts = [len(q) for q in questions]
    document = np.repeat(np.arange(len(questions)), counts)
    none = np.zeros(len(document), np.int64)
    hashes = np.concatenate([np.empty(0, np.uint64), *questions])
    begins = np.zeros(len(questions) + 1, np.int64)
    return Words(np.empty(0, np.uint32), begins, document, none, none, hashes, none.astype(bool))


class _Table:
    """Which values of their first bits some hashes have: says no of nearly all others, at one look."""

    def __init__(self, keys: np.ndarray) -> None:
        bits = min(max(16 * len(keys), 1 << 12).bit_length(), 26)
        self.shift = np.uint64(64 - bits)
        self.bits = np.zeros(1 << bits, bool)
        self.bits[keys >> self.shift] = True

    def may_have(self, keys: np.ndarray) -> np.ndarray:
        return self.bits[keys >> self.shift]
