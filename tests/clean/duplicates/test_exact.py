"""Equal documents, lines and paragraphs are those that plain Python finds, however the data is cut."""

import random

import pytest

from ropewalk.clean.duplicates.exact import ExactDuplicates
from ropewalk.clean.duplicates.pieces import DuplicateLines, DuplicateParagraphs

from .parts import reduced

CUTS = [None, [0, 30, 1, 9]]


def documents(seed: int, count: int = 40) -> list[str]:
    """Some lines and paragraphs that come back, with blank lines of several kinds."""
    rng = random.Random(seed)
    lines = [
        "",
        "x",
        " the line ",
        "THE  LINE",
        "another line\r",
        "über alles",
        "\tfour five six",
        "\ud800 odd",
    ]
    breaks = ["\n", "\n", "\n\n", "\n \t\n", "\n\n\n", "\r\n\r\n"]
    return [
        "".join(rng.choice(lines) + rng.choice(breaks) for _ in range(rng.randint(0, 9)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("sizes", CUTS)
def test_documents_are_duplicates_of_the_preferred_equal_one(sizes):
    rng = random.Random(2)
    texts = [rng.choice(["", "a b", "A  b\n", "a c", "d", "\ud800"]) for _ in range(40)]
    kept = [rng.random() < 0.8 for _ in texts]
    preference = [float(rng.randrange(3)) for _ in texts]
    found = reduced(ExactDuplicates(), texts, sizes, kept=kept, preference=preference)
    for row, text in enumerate(texts):
        equal = [i for i, t in enumerate(texts) if kept[i] and t == text]
        best = min(equal, key=lambda i: (preference[i], i)) if kept[row] else row
        assert found["exact_duplicate_of"][row] == (-1 if best == row else best)
        assert found["exact_duplicates"][row] == (len(equal) if kept[row] else 1)


def line_ranges(text: str) -> list[tuple[int, int]]:
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"] + [len(text)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def paragraph_ranges(text: str) -> list[tuple[int, int]]:
    """Lines up to a blank one, which are the paragraph's too as long as they follow."""
    found: list[tuple[int, int]] = []
    blank = True
    for start, end in line_ranges(text):
        if found and (not blank or not text[start:end].strip()):
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
        blank = not text[start:end].strip()
    return found


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize(
    ("step", "ranges"), [(DuplicateLines, line_ranges), (DuplicateParagraphs, paragraph_ranges)]
)
def test_all_but_the_preferred_place_of_a_piece_are_cut(step, ranges, sizes):
    texts = documents(3)
    rng = random.Random(4)
    kept = [rng.random() < 0.8 for _ in texts]
    preference = [float(rng.randrange(3)) for _ in texts]
    expected: list[list[str]] = [[] for _ in texts]
    seen = set()
    for row in sorted(range(len(texts)), key=lambda i: (preference[i], i)):
        for start, end in ranges(texts[row]) if kept[row] else ():
            content = texts[row][start:end].strip()
            if len(content) >= 5:
                if content in seen:
                    expected[row].append(content)
                seen.add(content)
    found = reduced(step(5), texts, sizes, kept=kept, preference=preference)
    cut = [
        [text[s["start"] : s["end"]] for s in spans]
        for text, spans in zip(texts, found[step.name], strict=True)
    ]
    assert [[piece.strip() for piece in pieces] for pieces in cut] == expected
    assert sum(map(len, expected)) > 10
    assert found[f"{step.name}_characters"] == [sum(map(len, pieces)) for pieces in cut]


@pytest.mark.parametrize("step", [DuplicateLines, DuplicateParagraphs])
def test_what_is_left_has_the_breaks_of_its_own_pieces(step):
    texts = ["first one here\n\nthe second\n\nthe third", "the new one\n\nfirst one here\n\nthe last one"]
    spans = reduced(step(5), texts)[step.name][1]
    left = texts[1][: spans[0]["start"]] + texts[1][spans[0]["end"] :]
    assert left.replace("\n\n\n", "\n\n") == "the new one\n\nthe last one"
    assert [span["kind"] for span in spans] == [step.name]


@pytest.mark.parametrize("step", [ExactDuplicates(), DuplicateLines(5), DuplicateParagraphs(5)])
def test_nothing_at_all_gives_nothing(step):
    assert all(column == [] for column in reduced(step, []).values())
    assert [bool(row) and row != -1 for row in reduced(step, ["one"])[next(iter(step.attributes))]] == [False]
