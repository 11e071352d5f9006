"""Keys and secrets that were left in texts.

Every pattern begins with fixed letters, so that a text without them costs one search, and has bounded
repetitions only: time is linear in the text.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ropewalk.clean.words import Words, hashes_of

_KEYS = {  # fixed beginning -> the whole, as the issuers' documentation describes them
    "AKIA": r"AKIA[A-Z2-7]{16}(?![A-Za-z0-9])",
    "ASIA": r"ASIA[A-Z2-7]{16}(?![A-Za-z0-9])",
    "ghp_": r"ghp_[A-Za-z0-9]{36,255}",
    "gho_": r"gho_[A-Za-z0-9]{36,255}",
    "ghs_": r"ghs_[A-Za-z0-9]{36,255}",
    "ghr_": r"ghr_[A-Za-z0-9]{36,255}",
    "ghu_": r"ghu_[A-Za-z0-9]{36,255}",
    "github_pat_": r"github_pat_[A-Za-z0-9_]{36,255}",
    "AIza": r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "xox": r"xox[abprs]-[A-Za-z0-9-]{10,250}",
    "sk_live_": r"sk_live_[A-Za-z0-9]{16,250}",
    "sk-": r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,250}",
    "hf_": r"hf_[A-Za-z]{34}(?![A-Za-z0-9])",
    "eyJ": r"eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{16,2000}",
}
_PATTERNS = {start: re.compile(r"(?<![A-Za-z0-9_-])" + whole) for start, whole in _KEYS.items()}
_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
LONGEST_BLOCK = 20_000
"""Characters of a private key; of one without end so many count as it."""
NAMES = (
    "secret password passwd pwd token apikey key credential credentials accesskey secretkey privatekey "
    "authtoken accesstoken clientsecret"
)
"""Words after which a value may be a secret."""
_VALUE = re.compile(
    r"[A-Za-z0-9_-]{1,40}[\"']?[ \t]{0,4}(?:=|:|=>|:=)[ \t]{0,4}[\"'`]?([A-Za-z0-9+/_=-]{16,200})"
)
ENTROPY = 3.7
"""Bits a character, at least, for a value to look random. (English words in snake case: up to about 3.6.)"""


def find_secrets(texts: list[str], words: Words) -> Iterator[tuple[int, int, int]]:
    """(text, start, end) of each; one may be found twice."""
    for number, text in enumerate(texts):
        for start, pattern in _PATTERNS.items():
            if start in text:
                yield from ((number, *match.span()) for match in pattern.finditer(text))
        if "PRIVATE KEY" in text:
            yield from ((number, *place) for place in _blocks(text))
    names = np.flatnonzero(np.isin(words.hashes, hashes_of(NAMES)))
    for document, place in zip(
        words.document[names].tolist(),
        (words.starts - words.begins[words.document])[names].tolist(),
        strict=True,
    ):
        match = _VALUE.match(texts[document], place)
        if match and _is_random(match[1]):
            yield document, match.start(1), match.end(1)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    done = 0
    for begin in _BEGIN.finditer(text):
        if begin.start() >= done:
            end = _END.search(text, begin.end(), begin.end() + LONGEST_BLOCK)
            done = end.end() if end else min(len(text), begin.end() + LONGEST_BLOCK)
            yield begin.start(), done


def _is_random(value: str) -> bool:
    """Letters and digits mixed, as no name or path has them."""
    digits = sum(c.isdigit() for c in value)
    if not digits or digits == len(value):
        return False
    turns = sum(a.isdigit() != b.isdigit() for a, b in pairwise(value))
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    return turns >= 4 and bits >= min(ENTROPY, 0.88 * math.log2(len(value)))
