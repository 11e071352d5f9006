"""How much a text repeats itself: the measures of Gopher (Rae et al. 2021, table A1).

What the paper leaves open is as in datatrove: a first occurrence is no duplicate, n-grams are of words and
punctuation, and the most frequent n-gram is counted as if its words had single spaces between them (so the
share of one that overlaps itself can be above 1). Characters in overlapping duplicates count once, as the
paper says (datatrove goes on behind each one that it finds and so leaves out the ends of long repeats).
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import opens, shared
from ropewalk.clean.lines import share
from ropewalk.clean.step import Step, Texts
from ropewalk.clean.words import Words, mix

TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
_STEP = np.uint64(0xD1342543DE82EF95)


class Repetition(Step):
    """Shares of lines and paragraphs that were there before, and of characters in repeated n-grams."""

    name = "repetition"
    attributes: Mapping[str, str] = {
        "duplicate_lines": "share of lines (blank ones aside) that were there before",
        "duplicate_line_characters": "share of characters in lines that were there before",
        "duplicate_paragraphs": "share of paragraphs that were there before",
        "duplicate_paragraph_characters": "share of characters in paragraphs that were there before",
        **{f"top_{n}gram_characters": f"share of characters in the most frequent {n}-gram" for n in TOP},
        **{
            f"duplicate_{n}gram_characters": f"share of characters in {n}-grams that were there before"
            for n in DUPLICATE
        },
    }

    def map(self, texts: Texts) -> pa.Table:
        characters = np.diff(texts.words.begins)
        columns = {}
        for kind, lines in (("line", texts.lines.filled), ("paragraph", texts.lines.paragraphs)):
            columns[f"duplicate_{kind}s"] = share(lines.count(lines.repeated), lines.count())
            repeated = lines.characters(lines.repeated)
            columns[f"duplicate_{kind}_characters"] = share(repeated, characters)
        for n, found in _ngram_characters(texts.words).items():
            name = f"top_{n}gram_characters" if n in TOP else f"duplicate_{n}gram_characters"
            columns[name] = share(found, characters)
        return pa.table(columns)


def _ngram_characters(words: Words) -> dict[int, np.ndarray]:
    """For each n, [texts] characters in the most frequent n-gram or in duplicate ones.

    Only where two n-grams begin side by side that are there more than once can a longer one be: so one look
    at all of the 2-grams is most of the work.
    """
    # Hashes of words of different texts differ, so that equal n-grams are of one text.
    hashes = words.hashes ^ mix(words.document.astype(np.uint64) + np.uint64(1))
    lengths = np.concatenate([[0], np.cumsum(words.ends - words.starts)])
    places = np.flatnonzero(words.document[1:] == words.document[:-1])
    rolled = hashes[places]
    result = {}
    for n in range(2, max(DUPLICATE) + 1):
        rolled = rolled * _STEP + hashes[places + n - 1]
        groups = _Groups(rolled, places)
        if n in TOP:
            result[n] = _top(words, groups, lengths, n)
        if n in DUPLICATE:
            result[n] = _covered(words, groups.later, lengths, n)
        frequent = groups.frequent
        longer = np.flatnonzero(places[frequent][1:] == places[frequent][:-1] + 1)
        places, rolled = places[frequent][longer], rolled[frequent][longer]
    return result


class _Groups:
    """n-grams with equal hashes; `places` [m] are ascending.

    `frequent` [k] int64 numbers those n-grams that have an equal, ascending; `later` are the places of all
    of them but the first of each group; `first` and `size` [groups] are the groups' first place and size.
    """

    def __init__(self, hashes: np.ndarray, places: np.ndarray) -> None:
        order = np.argsort(hashes)
        opening = opens(hashes[order])
        inside = shared(opening)
        members = order[inside]
        begins = np.flatnonzero(opening[inside])
        heads = np.minimum.reduceat(members, begins) if len(members) else members
        self.first = places[heads]
        self.size = np.diff(begins, append=len(members))
        chosen = np.zeros(len(hashes), bool)
        chosen[members] = True
        self.frequent = np.flatnonzero(chosen)
        chosen[heads] = False
        self.later = places[chosen]


def _top(words: Words, groups: _Groups, lengths: np.ndarray, n: int) -> np.ndarray:
    """[texts] characters in the most frequent n-gram, the earliest of equals; where none is there twice, in
    the first."""
    size = np.ones(words.texts, np.int64)
    place = np.where(words.counts >= n, words.offsets[:-1], -1)
    document = words.document[groups.first]
    order = np.lexsort((groups.first, -groups.size, document))
    best = order[np.flatnonzero(np.diff(document[order], prepend=-1))]
    size[document[best]], place[document[best]] = groups.size[best], groups.first[best]
    there = place >= 0
    result = np.zeros(words.texts)
    result[there] = size[there] * (lengths[place[there] + n] - lengths[place[there]] + n - 1)
    return result


def _covered(words: Words, places: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """[texts] characters of words in any of the n-grams at `places`, which are ascending."""
    begin = np.maximum(places, np.concatenate([[0], places[:-1] + n])[: len(places)])
    found = lengths[places + n] - lengths[begin]
    return np.bincount(words.document[places], found, minlength=words.texts)
