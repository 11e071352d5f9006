"""Documents to look at: the beginning of each, or the part where something is, with the places marked."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ropewalk.clean.lines import Lines
from ropewalk.clean.step import Texts
from ropewalk.data.view import View

CHARACTERS = 500
BEFORE = 80
"""Characters that are shown before the first place that is marked."""
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, what turns the direction of writing around, and halves of characters."""
Place = tuple[int, int]
"""Characters start to end of a text."""
Marks = Callable[[str], Iterable[Place]]
"""Places in a text that are to be marked."""


def visible(text: str) -> str:
    """With signs for characters that would do something to a page or a terminal instead of being seen."""
    return _UNSEEN.sub(_seen, text)


def _seen(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 32 else f"[U+{code:04X}]"


def shown(text: str, marks: Iterable[Place] = (), characters: int = CHARACTERS) -> dict[str, Any]:
    """The text's beginning, or from a little before the first mark: {text, marks in it, before, after}, the
    last two in characters that are not shown."""
    marks = sorted(marks)
    start = max(marks[0][0] - BEFORE, 0) if marks and marks[0][0] > characters // 2 else 0
    end = min(start + characters, len(text))
    inside = [[max(a, start) - start, min(b, end) - start] for a, b in marks if a < end and b > start]
    return {"text": text[start:end], "marks": _apart(inside), "before": start, "after": len(text) - end}


def _apart(marks: Sequence[list[int]]) -> list[list[int]]:
    """Ascending, none in two."""
    result: list[list[int]] = []
    for a, b in marks:
        if result and a <= result[-1][1]:
            result[-1][1] = max(b, result[-1][1])
        else:
            result.append([a, b])
    return result


def reasons(text: str, columns: Iterable[str], values: Mapping[str, Any]) -> list[Place]:
    """Where in a text lies what a rule over these attributes saw: places that an attribute names, repeated
    lines and paragraphs, repeated n-grams. Of most attributes there is no such place."""
    found: list[Place] = []
    for name in columns:
        value = values.get(name)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found += [(place["start"], place["end"]) for place in value]
        elif name.startswith("duplicate_paragraph"):
            found += _repeated(Texts([text]).lines.paragraphs)
        elif name.startswith(("duplicate_line", "repeated_line")):
            found += _repeated(Texts([text]).lines.filled)
        elif name.endswith("gram_characters"):
            found += _ngrams(text, int("".join(filter(str.isdigit, name))), name.startswith("top"))
    return found


def _repeated(lines: Lines) -> list[Place]:
    here = lines.where(lines.repeated)
    return list(zip(here.starts.tolist(), here.ends.tolist(), strict=True))


def _ngrams(text: str, n: int, most: bool) -> list[Place]:
    """Those that were there before, or the most frequent."""
    words = Texts([text]).words
    hashes, first = words.ngrams(n)
    if not len(hashes):
        return []
    _, at, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    if most:
        chosen = inverse == np.argmax(counts)
    else:
        chosen = at[inverse] != np.arange(len(hashes))
    starts, ends = words.starts[first[chosen]], words.ends[first[chosen] + n - 1]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


class Wanted:
    """Documents that are to be shown: asked for one by one, and filled in together, each part's in one go."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._asked: dict[int, list[tuple[int, dict[str, Any], Marks]]] = {}
        """part -> (row, what to fill in, where in its text)"""

    def sample(self, part: int, row: int, marks: Marks = lambda text: (), **more: Any) -> dict[str, Any]:
        """What `read` will fill in before `more`; `marks` is given the text."""
        entry: dict[str, Any] = {"id": "", "source": self.view.parts[part].source, **shown(""), **more}
        self._asked.setdefault(part, []).append((row, entry, marks))
        return entry

    def read(self) -> None:
        for part, asked in self._asked.items():
            rows = np.unique([row for row, _, _ in asked])
            records = dict(zip(rows.tolist(), self.view.parts[part].read().at(rows), strict=True))
            for row, entry, marks in asked:
                text = records[row].plain
                entry.update(id=records[row].id, **shown(text, marks(text)))
