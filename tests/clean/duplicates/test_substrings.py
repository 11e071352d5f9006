"""Repeated runs of words are those that a dictionary of all runs finds."""

import random
import re

import pytest

from ropewalk.clean.duplicates.substrings import DuplicateSubstrings

from .parts import reduced
from .real import pages


def by_dictionary(texts, n, kept, preference) -> list[list[tuple[int, int]]]:
    """(start, end) in characters of all runs of which an equal one comes before and does not overlap."""
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    found: list[list[tuple[int, int]]] = [[] for _ in texts]
    for row in sorted(range(len(texts)), key=lambda i: (preference[i], i)):
        words = list(re.finditer(r"[^\W_]+", texts[row])) if kept[row] else []
        inside = [False] * len(words)
        for i in range(len(words) - n + 1):
            run = tuple(word.group().lower() for word in words[i : i + n])
            where = first.setdefault(run, (row, i))
            if where[0] != row or i - where[1] >= n:
                inside[i : i + n] = [True] * n
        for i, word in enumerate(words):
            if inside[i] and i and inside[i - 1]:
                found[row][-1] = (found[row][-1][0], word.end())
            elif inside[i]:
                found[row].append((word.start(), word.end()))
    return found


def spans(found: dict[str, list]) -> list[list[tuple[int, int]]]:
    return [[(s["start"], s["end"]) for s in row] for row in found["repeated_passages"]]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_few_words_that_come_back_all_the_time(n, seed):
    """Periods, overlaps, runs that touch, texts that are too short."""
    rng = random.Random(seed)
    texts = [
        " ".join(rng.choices("abAB", k=rng.randint(0, 40))) + rng.choice(["", ".", "?!"]) for _ in range(30)
    ]
    texts += ["a " * 50, "a b " * 30, ""]
    kept = [rng.random() < 0.9 for _ in texts]
    preference = [float(rng.randrange(3)) for _ in texts]
    expected = by_dictionary(texts, n, kept, preference)
    for sizes, batch in (([len(texts)], 64), ([10, 0, 20, 3], 3)):
        found = reduced(DuplicateSubstrings(n), texts, sizes, batch=batch, kept=kept, preference=preference)
        assert spans(found) == expected
        lengths = [sum(end - start for start, end in row) for row in expected]
        assert found["repeated_passages_characters"] == lengths


@pytest.mark.parametrize("n", [20, 50])
def test_passages_of_real_text_put_into_others(shared, n):
    rng = random.Random(n)
    texts = pages(shared, 60, size=1500)
    for _ in range(60):
        a, b = rng.sample(range(len(texts)), 2)
        start, place = rng.randrange(1200), rng.randrange(1500)
        passage = texts[a][start : start + rng.randrange(100, 900)]
        texts[b] = (
            f"{texts[b][:place]} {passage.upper() if rng.random() < 0.3 else passage} {texts[b][place:]}"
        )
    everything, alike = [True] * len(texts), [0.0] * len(texts)
    expected = by_dictionary(texts, n, everything, alike)
    assert sum(map(len, expected)) > 20
    assert spans(reduced(DuplicateSubstrings(n), texts, [20, 40])) == expected


def test_nothing_at_all_gives_nothing():
    assert spans(reduced(DuplicateSubstrings(), [])) == []
    assert spans(reduced(DuplicateSubstrings(2), ["one"])) == [[]]
