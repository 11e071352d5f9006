"""What is looked for: items of evaluation sets, as sequences of words, and how telling such a sequence is."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ropewalk.clean.words import hashes_of, words_of

RARE = 14.0
"""Bits of a word that is not known to be common; about the mean of a book's words that are."""
_PRIOR = 20_000
"""Words of unknown text that the sets' own words are counted among: a word seen once says nothing."""
# The commonest words of English prose, the first first: the r-th is about every 10 r-th word (Zipf's law).
_COMMON = """
the of and to a in is that it for as was with be by on not he his are or this from at but have an had
they which you were one all we can there has her been if their more will would who so no she other its
may these what them than some him into only do any time my now such about then when out up use like how
could me our two first new after also should most where over made many must your each through did
between while set before being same much used does number because even see very way just well make
example using different list file name work get take here part long own say go why people three world
day year years life man men good great little old small large high place end house hand state city
country war case point thing things fact form word words line order kind water night home side head eyes
face body women woman children school group system power money names later still back down off too again
under last every never against both another right left during without however since until within upon
among thus though per around several found given called known said came come went makes know think want
need needs give gives put keep let seem show shows find look turn start open change move run call become
result note second half four five six ten hundred value type types function code data method class
object default return string text user process error possible single certain general common important
true allow allows following support current version whose whom
"""
_EVERYDAY = """
matter difference meaning means mean purpose reason cause color size sort best better worst problem
issue idea question title subject story book page letter paper price cost food family father mother son
daughter brother sister friend love death god king lord lady sir master young black white red blue green
light dark road street town door room table car sea earth air fire sun moon river mountain tree horse
dog fish today tomorrow yesterday morning evening week month hour minute season summer winter early late
soon ago once twice always sometimes often usually probably perhaps maybe enough almost nothing
something anything everything everyone someone anyone nobody happen happened speak tell told ask asked
talk feel felt believe remember hear heard read write wrote written build built bring brought hold held
leave lose lost meet met pay play sit stand wait walk watch win live lives lived die died born wish hope
fear reach follow create add remove delete increase decrease full empty real sure ready free easy hard
strong weak rich poor alone together away near far north south east west main major similar total
average area level rate amount age century president government law court party army capital science art
music history language english american united states national public social political human modern
simple available necessary various
"""
_EVERYDAY_BITS = 9.5
# Words of examinations tell nothing: they follow from each other wherever questions are asked.
_EXAMINATIONS = """
following true false correct incorrect answer answers question questions statement statements option
options best describes describe above below given choose select
"""
_EXAMINATION_BITS = 2.0
_SHORT_BITS = 7.0
"""Of a letter or a number of one or two digits."""
_INSIDE = re.compile(r"(?<=\w)[^\w\s]+(?=\w)")
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_ASKING = "what which who whom whose when where why how is are was were do does did can could"


@dataclass(frozen=True)
class EvaluationItem:
    """A question of an evaluation set. `id` is its number in the set, from 0, or what the set calls it.

    `answer` is the right one, in words; `choices` are all that are offered, in their order, and then `answer`
    is one of them. Plain documents are questions without an answer.
    """

    set: str
    id: str
    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()


def forms(texts: Iterable[str]) -> list[list[np.ndarray]]:
    """The words of each text as hashes [n] uint64, in the ways in which copies write them.

    Punctuation inside words separates (don't, 1,000: as in the text itself, and as tokenized text has it) or
    is left out (dont, 1000), and calculator annotations (GSM8K's <<2*3=6>>) are there or not.
    """
    ways: list[list[str]] = []
    for text in texts:
        plain = _ANNOTATION.sub("", text)
        ways.append(list(dict.fromkeys([text, _INSIDE.sub("", plain), plain])))
    words = words_of([way for several in ways for way in several]).only
    sequences = np.split(words.hashes, words.offsets[1:-1])
    found, row = [], 0
    for several in ways:
        mine = sequences[row : row + len(several)]
        found.append(list({one.tobytes(): one for one in mine}.values()))
        row += len(several)
    return found


def asks(question: str) -> bool:
    """Whether it is put as a question, which running text seldom is."""
    first = question.split(maxsplit=1)[:1]
    return question.rstrip().endswith("?") or (bool(first) and first[0].lower() in _ASKING.split())


class Rarity:
    """Bits of information in a sequence of words, each taken by itself: -log2 of its share of all words.

    The share is the higher of two: that of the commonest words of English, and that in the questions of the
    sets themselves, whose words are common where such things are written of. (No more than an estimate: words
    do not stand by themselves. How far it holds was measured; see bench/data_contamination.py.)
    """

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        """`sequences` are different questions, as hashes."""
        common = hashes_of(_COMMON)
        ranks = np.arange(1, len(common) + 1)
        short = " ".join([*map(str, range(100)), *"bcdefghijklmnopqrstuvwxyz"])
        known = dict.fromkeys(hashes_of(_EVERYDAY).tolist(), _EVERYDAY_BITS)
        known |= zip(common.tolist(), np.minimum(3.3 + np.log2(ranks), _EVERYDAY_BITS).tolist(), strict=True)
        known |= dict.fromkeys(hashes_of(_EXAMINATIONS).tolist(), _EXAMINATION_BITS)
        known |= dict.fromkeys(hashes_of(short).tolist(), _SHORT_BITS)
        if sequences:
            # in so many questions, less three: what few questions speak of is what tells them apart
            words, counts = np.unique(np.concatenate([np.unique(s) for s in sequences]), return_counts=True)
            total = sum(map(len, sequences)) + _PRIOR
            often = counts > 3
            asking = hashes_of(_ASKING).tolist()
            bits = -np.log2((counts[often] - 3) / total)
            for word, value in zip(words[often].tolist(), bits.tolist(), strict=True):
                if word not in asking:  # common in questions, and not where questions are not asked
                    known[word] = min(known.get(word, RARE), value)
        self._known = known

    def bits(self, words: np.ndarray) -> list[float]:
        """Of each of a sequence of hashes."""
        return [self._known.get(word, RARE) for word in words.tolist()]
