"""What the quality rules of Gopher (Rae et al. 2021, A1.1) and FineWeb (Penedo et al. 2024, 3.6) look at."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import pyarrow as pa

from ropewalk.clean.lines import Lines, any_of, share
from ropewalk.clean.step import Step, Texts
from ropewalk.clean.words import Words, hashes_of

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = "•-*‣◦▪●"
TERMINAL = ".!?。！？؟।۔…\"'”’»"
"""What ends a sentence, and the quotation marks that come after it."""
MARKS, WIDE_MARKS = ".!?…", "。！？।۔؟"
SHORT_LINE = 30


class Quality(Step):
    """Lengths, ratios and shares. Lines are those that are not blank; words are without symbols."""

    name = "quality"
    attributes: Mapping[str, str] = {
        "characters": "characters",
        "bytes": "bytes of UTF-8",
        "words": "words: runs of letters, digits and marks",
        "mean_word_length": "characters a word",
        "hash_ratio": "signs # a word",
        "ellipsis_ratio": "ellipses (… or ...) a word",
        "letter_words": "share of words with a letter",
        "stop_words": f"how many of {', '.join(STOP_WORDS)} are there, 0 to {len(STOP_WORDS)}",
        "lines": "lines that are not blank",
        "bullet_lines": f"share of lines that begin with one of {BULLETS}",
        "ellipsis_lines": "share of lines that end with an ellipsis",
        "terminal_lines": f"share of lines that end with one of {TERMINAL}",
        "short_lines": f"share of lines of at most {SHORT_LINE} characters",
        "repeated_line_characters": "share of characters, line feeds aside, in lines that were there before",
        "newline_ratio": "line feeds a word",
        "sentences": "ends of sentences, by punctuation: crude where there are abbreviations",
    }

    def map(self, texts: Texts) -> pa.Table:
        words, lines = texts.words, texts.lines.filled
        characters = np.diff(words.begins)
        newlines = np.fromiter((t.count("\n") for t in texts.texts), np.int64, len(texts))
        hashes = np.fromiter((t.count("#") for t in texts.texts), np.int64, len(texts))
        ellipses = np.fromiter((t.count("...") + t.count("…") for t in texts.texts), np.int64, len(texts))
        counts, total = words.only.counts, lines.count()
        columns = {
            "characters": characters,
            "bytes": np.fromiter(map(_bytes, texts.texts), np.int64, len(texts)),
            "words": counts,
            "mean_word_length": share(_letters(words.only), counts),
            "hash_ratio": share(hashes, counts),
            "ellipsis_ratio": share(ellipses, counts),
            "letter_words": share(_with_letter(words.only), counts),
            "stop_words": _stop_words(words.only),
            "lines": total,
            "bullet_lines": share(lines.count(any_of(lines.first_character, BULLETS)), total),
            "ellipsis_lines": share(lines.count(ends_with_ellipsis(lines)), total),
            "terminal_lines": share(lines.count(any_of(lines.last_character(), TERMINAL)), total),
            "short_lines": share(lines.count(lines.lengths <= SHORT_LINE), total),
            "repeated_line_characters": share(lines.characters(lines.repeated), characters - newlines),
            "newline_ratio": share(newlines, counts),
            "sentences": np.bincount(words.document[sentence_ends(words)], minlength=len(texts)),
        }
        return pa.table(columns)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _letters(words: Words) -> np.ndarray:
    """[texts] characters in words."""
    return np.bincount(words.document, words.ends - words.starts, minlength=words.texts)


def _with_letter(words: Words) -> np.ndarray:
    """[texts] how many words have a letter. (What lies between words has none.)"""
    if not len(words):
        return np.zeros(words.texts, np.int64)
    found = np.logical_or.reduceat(_letter_table()[words.codes], words.starts)
    return np.bincount(words.document[found], minlength=words.texts)


def _stop_words(words: Words) -> np.ndarray:
    """[texts] how many different ones each text has."""
    found = np.zeros(words.texts, np.int64)
    for value in hashes_of(" ".join(STOP_WORDS)):
        found += words.texts_with(words.hashes == value)
    return found


def ends_with_ellipsis(lines: Lines) -> np.ndarray:
    """bool, of lines that are not blank."""
    last = lines.last_character()
    dots = (last == ord(".")) & (lines.last_character(1) == ord(".")) & (lines.last_character(2) == ord("."))
    return dots & (lines.lengths >= 3) | (last == ord("…"))


def sentence_ends(words: Words) -> np.ndarray:
    """Numbers of the symbols that end a sentence: they begin or end with its mark, white space or the text's
    end comes after them, and no word in lower case. (Marks of scripts without spaces need no space.)"""
    symbols = np.flatnonzero(words.symbol)
    if not len(symbols):
        return symbols
    marks = [words.codes[places[symbols]] for places in (words.starts, words.ends - 1)]
    wide = any_of(marks[0], WIDE_MARKS) | any_of(marks[1], WIDE_MARKS)
    narrow = any_of(marks[0], MARKS) | any_of(marks[1], MARKS)
    last = np.append(words.document[1:] != words.document[:-1], True)[symbols]
    following = np.minimum(symbols + 1, len(words) - 1)
    apart = words.starts[following] > words.ends[symbols]
    lower = _lower_table()[words.codes[words.starts[following]]]
    return symbols[wide | narrow & (last | apart & ~lower)]


@cache
def _letter_table() -> np.ndarray:
    """[characters] bool, as `str.isalpha`."""
    return np.fromiter((chr(i).isalpha() for i in range(0x110000)), bool, 0x110000)


@cache
def _lower_table() -> np.ndarray:
    """[characters] bool, as `str.islower`."""
    return np.fromiter((chr(i).islower() for i in range(0x110000)), bool, 0x110000)
