"""Whether a question that was found is evidence of its item: how telling it is, and if its answer follows.

All is weighed in bits, as if words stood by themselves: a sequence of b bits is met by chance at one place of
2^b. The threshold and the extras are set by measurement (bench/data_contamination.py): with 14,000 items less
than one in 1,000 unrelated documents is taken for contaminated.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ropewalk.clean.contamination.index import BOILERPLATE, LONG, SHORTEST
from ropewalk.clean.contamination.items import EvaluationItem, Rarity, asks, forms
from ropewalk.clean.step import Texts
from ropewalk.clean.words import Words, hashes_of

ENOUGH = 40.0
"""Bits at which a question of fewer than 13 words counts as found."""
_ENOUGH_ELSEWHERE = 20.0
"""Bits of answer and choices that a question which several items share needs besides."""
_TELLING = 10.0
"""A question without a word of so many bits is a turn of phrase, however it is put."""
_ASKED, _EDGE = 10.0, 3.0
_WINDOW = 64
"""Words after a question in which its answer is looked for, besides its choices' own."""
_CHANCE = 6.0
"""log2 of the window: so much of an answer's bits is chance."""
_TRIVIAL, _NEAR = 12.0, 8
"""An answer of fewer bits (a number, yes) must follow within 8 words."""
_ANSWERS = "answer ans correct solution key"
"""Words after which the letter of the right choice stands."""
_STOPS = re.compile(r"[\n\r.!?:;\"“”„«»()\[\]{}<>#*|•=—]")


@dataclass(frozen=True)
class Occurrence:
    """A question in a text: places in characters. `answer` is None where only the question was found."""

    item: EvaluationItem
    share: float
    start: int
    end: int
    answer: tuple[int, int] | None


@dataclass(frozen=True)
class _Sought:
    """The words of an item besides its question's."""

    item: EvaluationItem
    answers: list[np.ndarray]
    others: list[np.ndarray]
    letter: int | None
    """hash of the right choice's letter"""

    @property
    def reach(self) -> int:
        own = max((len(answer) for answer in self.answers), default=0)
        return _WINDOW + 2 * own + sum(len(other) + 1 for other in self.others)


@dataclass(frozen=True)
class _Question:
    """A sequence of words, hashes [words], and the numbers of the items that ask so."""

    words: np.ndarray
    asked: bool
    owners: list[int]


class Evidence:
    """All items, by their questions. `questions` are different sequences of words, hashes [words] each."""

    def __init__(self, items: Sequence[EvaluationItem]) -> None:
        ways = forms(item.question for item in items)
        self.too_short: list[EvaluationItem] = []
        different: dict[bytes, _Question] = {}
        for number, (item, several) in enumerate(zip(items, ways, strict=True)):
            long_enough = [way for way in several if len(way) >= SHORTEST]
            if not long_enough:
                self.too_short.append(item)
            for way in long_enough:
                question = _Question(way, asks(item.question), [])
                different.setdefault(way.tobytes(), question).owners.append(number)
        self._questions = list(different.values())
        self.questions = [question.words for question in self._questions]
        plain = {several[0].tobytes(): several[0] for several in ways if len(several[0])}
        self._rarity = Rarity(list(plain.values()))
        self._sought = _sought(items)
        self._shared = [
            len({(items[i].answer, items[i].choices) for i in question.owners}) > BOILERPLATE
            for question in self._questions
        ]

    def weigh(
        self, texts: Texts, question: int, share: float, first: int, last: int, common: bool
    ) -> list[Occurrence]:
        """The items whose question was found from word `first` to word `last` of `texts.words.only`.

        `common`: nothing in it is its own, so that it needs other evidence. Empty where it is not enough.
        """
        words = texts.words.only
        document = int(words.document[first])
        begin = int(words.begins[document])
        followed = [(i, *self._after(words, last, self._sought[i])) for i in self._questions[question].owners]
        needs_more = common or self._shared[question]
        if needs_more or len(self.questions[question]) < LONG:
            own = 0.0 if needs_more else self._bits(texts.texts[document], words, question, first, last)
            needed = _ENOUGH_ELSEWHERE if needs_more else ENOUGH
            followed = [one for one in followed if own + one[2] >= needed]
        # Of several items with this question those are meant whose answer or choices are there too.
        best = [one for one in followed if one[2] > 0]
        start, end = int(words.starts[first]) - begin, int(words.ends[last]) - begin
        found = []
        for i, answer, _ in best or followed:
            place = None
            if answer is not None:
                place = int(words.starts[answer[0]]) - begin, int(words.ends[answer[1]]) - begin
            found.append(Occurrence(self._sought[i].item, share, start, end, place))
        return found

    def _bits(self, text: str, words: Words, question: int, first: int, last: int) -> float:
        """Of a short question as it stands in a text."""
        each = self._rarity.bits(self.questions[question])
        if max(each) < _TELLING:
            return sum(each)
        begin = words.begins[words.document[first]]
        inside = words.offsets[words.document[first]], words.offsets[words.document[first] + 1]
        before = int(words.ends[first - 1] - begin) if first > inside[0] else None
        after = int(words.starts[last + 1] - begin) if last + 1 < inside[1] else None
        start, end = int(words.starts[first] - begin), int(words.ends[last] - begin)
        edges = (before is None or bool(_STOPS.search(text, before, start))) + (
            after is None or bool(_STOPS.search(text, end, after))
        )
        return sum(each) + _ASKED * self._questions[question].asked + _EDGE * edges

    def _after(self, words: Words, last: int, sought: _Sought) -> tuple[tuple[int, int] | None, float]:
        """(first and last word of the answer after a question that ends with word `last`, or None; the bits
        of answer and choices found there)."""
        stop = int(words.offsets[words.document[last] + 1])
        window = words.hashes[last + 1 : min(stop, last + 1 + sought.reach)]
        others = [other for other in sought.others if len(_places(window, other))]
        bits = sum(max(0.0, sum(self._rarity.bits(other)) - _CHANCE) for other in others)
        for answer in sought.answers:
            found = self._answer(window, answer, sought, listed=bool(others))
            if found is not None or len(_places(window, answer)):
                bits += max(0.0, sum(self._rarity.bits(answer)) - _CHANCE)
            if found is not None:
                return (last + 1 + found[0], last + 1 + found[1]), bits
        return None, bits

    def _answer(
        self, window: np.ndarray, answer: np.ndarray, sought: _Sought, listed: bool
    ) -> tuple[int, int] | None:
        """Where the answer is given. Among its alternatives it is only listed: then it must be there a second
        time, or its letter after the word answer."""
        if len(answer) >= LONG:
            return _part(window, answer)
        places = _places(window, answer)
        if not listed:
            if sum(self._rarity.bits(answer)) < _TRIVIAL:
                places = places[places < _NEAR]
            return (int(places[0]), int(places[0]) + len(answer) - 1) if len(places) else None
        if len(places) > 1:
            return int(places[1]), int(places[1]) + len(answer) - 1
        if sought.letter is not None:
            marks = np.flatnonzero(np.isin(window, hashes_of(_ANSWERS)))
            for mark in marks.tolist():
                letters = np.flatnonzero(window[mark + 1 : mark + 4] == np.uint64(sought.letter))
                if len(letters):
                    return mark, mark + 1 + int(letters[0])
        return None


def _sought(items: Sequence[EvaluationItem]) -> list[_Sought]:
    answers = forms(item.answer or "" for item in items)
    others = forms(choice for item in items for choice in item.choices)
    letters = hashes_of("A B C D E F G H I J").tolist()
    found, at = [], 0
    for item, own in zip(items, answers, strict=True):
        choices = others[at : at + len(item.choices)]
        at += len(item.choices)
        right = item.choices.index(item.answer) if item.answer in item.choices else None
        found.append(
            _Sought(
                item,
                [answer for answer in own if len(answer)],
                [ways[0] for i, ways in enumerate(choices) if i != right and len(ways[0])],
                letters[right] if right is not None and right < len(letters) else None,
            )
        )
    return found


def _places(window: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """Where a sequence begins in a window of words."""
    if len(sequence) > len(window):
        return np.empty(0, np.int64)
    places = np.flatnonzero(window[: len(window) - len(sequence) + 1] == sequence[0])
    for k in range(1, len(sequence) if len(places) else 0):
        places = places[window[places + k] == sequence[k]]
    return places


def _part(window: np.ndarray, answer: np.ndarray) -> tuple[int, int] | None:
    """The place of a long answer of which at least half the n-grams of 13 words are in the window."""
    if len(window) < LONG:
        return None
    own, there = (np.lib.stride_tricks.sliding_window_view(x, LONG) for x in (answer, window))
    known = {gram.tobytes() for gram in own}
    places = [i for i, gram in enumerate(there) if gram.tobytes() in known]
    if 2 * len({there[i].tobytes() for i in places}) < len(known):
        return None
    return places[0], places[-1] + LONG - 1
