"""Measures of quality and repetition equal a plain reading, text by text, whatever the batch."""

import re
from collections import Counter

import pytest

from ropewalk.clean.quality import BULLETS, STOP_WORDS, TERMINAL, Quality
from ropewalk.clean.repetition import DUPLICATE, TOP, Repetition
from ropewalk.clean.step import Texts
from ropewalk.clean.words import words_of

from .samples import ODD, pages


@pytest.fixture(scope="module")
def texts(shared):
    return ODD + pages(shared, 150)


def tokens(text: str) -> list[str]:
    words = words_of([text])
    return [text[a:b] for a, b in zip(words.starts, words.ends, strict=True)]


def words(text: str) -> list[str]:
    found = words_of([text]).only
    return [text[a:b] for a, b in zip(found.starts, found.ends, strict=True)]


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def over(part: float, whole: float) -> float:
    return part / whole if whole else 0


def repeated(pieces: list[str]) -> list[str]:
    return [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]


def quality(text: str) -> dict[str, float]:
    own, rows = words(text), lines(text)
    return {
        "characters": len(text),
        "bytes": len(text.encode("utf-8", "surrogatepass")),
        "words": len(own),
        "mean_word_length": over(sum(map(len, own)), len(own)),
        "hash_ratio": over(text.count("#"), len(own)),
        "ellipsis_ratio": over(len(re.findall(r"…|\.\.\.", text)), len(own)),
        "letter_words": over(sum(any(c.isalpha() for c in word) for word in own), len(own)),
        "stop_words": len({word.lower() for word in own} & set(STOP_WORDS)),
        "lines": len(rows),
        "bullet_lines": over(sum(row.strip()[0] in BULLETS for row in rows), len(rows)),
        "ellipsis_lines": over(sum(row.rstrip().endswith(("...", "…")) for row in rows), len(rows)),
        "terminal_lines": over(sum(row.rstrip()[-1] in TERMINAL for row in rows), len(rows)),
        "short_lines": over(sum(len(row) <= 30 for row in rows), len(rows)),
        "repeated_line_characters": over(sum(map(len, repeated(rows))), len(text.replace("\n", ""))),
        "newline_ratio": over(text.count("\n"), len(own)),
    }


def repetition(text: str) -> dict[str, float]:
    blocks = ["\n".join(block) for block in paragraphs(text)]
    own = [token.lower() if len(token.lower()) == len(token) else token for token in tokens(text)]
    found = {
        "duplicate_lines": over(len(repeated(lines(text))), len(lines(text))),
        "duplicate_line_characters": over(sum(map(len, repeated(lines(text)))), len(text)),
        "duplicate_paragraphs": over(len(repeated(blocks)), len(blocks)),
        "duplicate_paragraph_characters": over(sum(map(len, repeated(blocks))), len(text)),
    }
    for n in TOP:
        ngrams = [" ".join(own[i : i + n]) for i in range(len(own) - n + 1)]
        top = Counter(ngrams).most_common(1)
        found[f"top_{n}gram_characters"] = over(sum(len(a) * b for a, b in top), len(text))
    for n in DUPLICATE:
        seen: set[tuple[str, ...]] = set()
        covered: set[int] = set()
        for i in range(len(own) - n + 1):
            ngram = tuple(own[i : i + n])
            covered |= set(range(i, i + n)) if ngram in seen else set()
            seen.add(ngram)
        found[f"duplicate_{n}gram_characters"] = over(sum(len(own[i]) for i in covered), len(text))
    return found


def paragraphs(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        else:
            found.append([])
    return [block for block in found if block]


@pytest.mark.parametrize(("step", "plain"), [(Quality(), quality), (Repetition(), repetition)])
def test_measures_equal_a_plain_reading_of_each_text(texts, step, plain):
    rows = step.map(Texts(texts)).to_pylist()
    for text, row in zip(texts, rows, strict=True):
        expected = plain(text)
        assert {name: row[name] for name in expected} == pytest.approx(expected), text[:200]


@pytest.mark.parametrize("step", [Quality(), Repetition()])
def test_a_text_is_measured_alike_whatever_else_is_in_the_batch(texts, step):
    whole = step.map(Texts(texts))
    assert set(whole.column_names) == set(step.attributes)
    for size in (1, 7):
        parts = [step.map(Texts(texts[i : i + size])) for i in range(0, 40, size)]
        assert [row for part in parts for row in part.to_pylist()][:40] == whole.slice(0, 40).to_pylist()
    assert step.map(Texts([])).num_rows == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ('He said "no." Then he left (at last). And', 2),
        ("Version 3.14 of foo.py, e.g. this one", 0),
        ("これは本です。それも本です。", 2),
        ("No end", 0),
    ],
)
def test_sentences_are_counted_by_their_ends(text, count):
    assert Quality().map(Texts(["Other.", text, "a"]))["sentences"].to_pylist() == [1, count, 0]
