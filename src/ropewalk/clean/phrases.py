"""Where given words or phrases are, in many texts at once."""

import numpy as np

from ropewalk.clean.words import Words, words_of


def find_phrase(words: Words, phrase: str) -> np.ndarray:
    """Numbers of the words with which the phrase begins, whatever the case and the white space. Symbols in it
    or between its words must be those of the phrase."""
    wanted = words_of([phrase]).hashes
    found = np.flatnonzero(words.hashes == wanted[0])
    found = found[found + len(wanted) <= len(words)]
    for place, value in enumerate(wanted[1:], 1):
        found = found[words.hashes[found + place] == value]
    return found[words.document[found] == words.document[found + len(wanted) - 1]]
