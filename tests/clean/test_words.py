"""Words as arrays equal a plain reading of the text, letter by letter."""

import random
import re
import unicodedata

import numpy as np
import pytest

from ropewalk.clean.words import _KIND, SINGLE, _table, words_of

TEXTS = [
    "Hello, hello  WORLD!",
    "",
    "日本語 text ไทย",
    "a\n\nb--c d_e",
    "İstanbul straße Ǆ",
    "\ud800x \U0001f600\U0001f600y",
]


def plain(text: str) -> list[str]:
    kinds = _table() >> _KIND
    found, last = [], None
    for character in text:
        kind = kinds[ord(character)]
        if kind and kind != SINGLE and kind == last:
            found[-1] += character
        elif kind:
            found.append(character)
        last = kind
    return found


def test_words_are_the_runs_of_a_plain_reading_and_their_places_are_in_the_text():
    words = words_of(TEXTS)
    for i, text in enumerate(TEXTS):
        here = slice(words.offsets[i], words.offsets[i + 1])
        places = zip(words.starts[here] - words.begins[i], words.ends[here] - words.begins[i], strict=True)
        assert [text[a:b] for a, b in places] == plain(text)


def test_letters_digits_and_marks_are_words():
    kinds = _table() >> _KIND
    for character in "aZ9é日ก\u0301":
        assert kinds[ord(character)] in (1, 2)
    for character in "!-_€\u200b😀":
        assert kinds[ord(character)] == 3, unicodedata.category(character)
    for character in " \t\n\u00a0\u3000":
        assert kinds[ord(character)] == 0


def test_equal_words_have_equal_hashes_and_others_have_others():
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(3000)]
    text = " ".join(word.upper() if rng.random() < 0.3 else word for word in vocabulary)
    hashes = words_of([text, "other", text]).only.hashes
    n = len(vocabulary)
    assert (hashes[:n] == hashes[n + 1 :]).all()
    assert len(set(hashes[:n].tolist())) == len(set(vocabulary))


def test_a_text_is_the_same_whatever_else_is_in_the_batch():
    alone = [words_of([text]).hashes for text in TEXTS]
    assert (np.concatenate(alone) == words_of(TEXTS).hashes).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams_lie_in_one_text_and_depend_on_order(n):
    words = words_of(["a b c a b c", "a b c", "c b a", "x"]).only
    hashes, first = words.ngrams(n)
    texts = [re.findall(r"\w", "a b c a b c"), list("abc"), list("cba"), ["x"]]
    expected = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    assert len(hashes) == len(expected) == len(first)
    same = hashes[:, None] == hashes[None]
    assert (same == [[a == b for b in expected] for a in expected]).all()


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 16])
def test_texts_that_are_looked_at_together_make_no_difference(block, monkeypatch):
    texts = [*TEXTS, "", "x", "one more line\nand  another", "", "日本"] * 3
    alone = [words_of([text]) for text in texts]
    monkeypatch.setattr("ropewalk.clean.words._BLOCK", block)
    words = words_of(texts)
    assert words.counts.tolist() == [len(one) for one in alone]
    begins = words.begins[:-1]
    for name, shift in (("starts", begins), ("ends", begins), ("hashes", None), ("symbol", None)):
        wanted = np.concatenate([getattr(one, name) for one in alone])
        found = getattr(words, name)
        assert (found == (wanted if shift is None else wanted + shift[words.document])).all(), name
    exact = words.hashes_between(words.starts, words.ends)
    assert (exact == np.concatenate([one.hashes_between(one.starts, one.ends) for one in alone])).all()
