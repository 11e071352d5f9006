"""Lines and paragraphs that stand somewhere before: navigation, licences, disclaimers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import within
from ropewalk.clean.duplicates.exact import digests
from ropewalk.clean.duplicates.places import PlaceSet, flat, lengths, orders_of, span_table
from ropewalk.clean.duplicates.rows import rows_of
from ropewalk.clean.duplicates.spill import Spill
from ropewalk.clean.step import Joined, Parts, Texts

_COLUMNS = {"key": pa.uint64(), "check": pa.uint64(), "start": pa.int32(), "end": pa.int32()}


@dataclass(frozen=True)
class _Pieces(Joined):
    """`minimum` is in characters, without white space at both ends, which never counts; shorter pieces may
    stand anywhere (`}`, `Introduction`). A span covers the break behind the piece, so that the cut leaves no
    hole."""

    minimum: int

    breaks: ClassVar[re.Pattern[str]]

    def settings(self) -> Any:
        return {"minimum": self.minimum}

    def map(self, texts: Texts) -> pa.Table:
        contents: list[str] = []
        starts, ends, counts = [], [], []
        for text in texts.texts:
            before = len(contents)
            for start, stop, end in _split(text, self.breaks):
                if stop - start < self.minimum:
                    continue
                content = text[start:stop].strip()
                if len(content) >= self.minimum:
                    contents.append(content)
                    starts.append(start)
                    ends.append(end)
            counts.append(len(contents) - before)
        found = digests(contents)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        values = dict(zip(_COLUMNS, (found[:, 0], found[:, 1], starts, ends), strict=True))
        return pa.table(
            {
                name: pa.ListArray.from_arrays(offsets, pa.array(values[name], kind))
                for name, kind in _COLUMNS.items()
            }
        )

    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        """A bit for each piece in memory, and 24 bytes on disk."""
        rows = rows_of(parts)
        counts = np.zeros(len(rows), np.int64)
        with Spill() as spill:
            for part in rows.parts:
                here = rows.of(part)
                table = parts.mapped(part, ["key", "check"])
                counts[here] = many = lengths(table["key"])
                taken = np.repeat(rows.kept[here], many)
                orders = orders_of(np.repeat(rows.rank[here], many), within(many))
                spill.add(flat(table["key"])[taken], flat(table["check"])[taken], orders[taken])
            repeated = PlaceSet(rows, counts)
            for order, preferred in spill.groups():
                repeated.add(order[order != preferred])
        for part in rows.parts:
            here = rows.of(part)
            table = parts.mapped(part, ["start", "end"])
            which, size = repeated.of(here), here.stop - here.start
            document = np.repeat(np.arange(size), counts[here])[which]
            yield span_table(
                self.name, size, document, flat(table["start"])[which], flat(table["end"])[which]
            )


def _split(text: str, breaks: re.Pattern[str]) -> Iterator[tuple[int, int, int]]:
    """(start, end, end with the break behind) of the pieces."""
    start = 0
    for found in breaks.finditer(text):
        yield start, found.start(), found.end()
        start = found.end()
    yield start, len(text), len(text)


@dataclass(frozen=True)
class DuplicateLines(_Pieces):
    """Lines, divided by line feeds."""

    minimum: int = 40

    name = "repeated_lines"
    breaks: ClassVar[re.Pattern[str]] = re.compile(r"\n")
    attributes: ClassVar[Mapping[str, str]] = {
        "repeated_lines": "spans: lines that are in a preferred or earlier place too",
        "repeated_lines_characters": "length of these spans together, in characters",
    }


@dataclass(frozen=True)
class DuplicateParagraphs(_Pieces):
    """Paragraphs, divided by blank lines."""

    minimum: int = 80

    name = "repeated_paragraphs"
    breaks: ClassVar[re.Pattern[str]] = re.compile(r"\n[^\S\n]*\n(?:[^\S\n]*\n)*")
    attributes: ClassVar[Mapping[str, str]] = {
        "repeated_paragraphs": "spans: paragraphs that are in a preferred or earlier place too",
        "repeated_paragraphs_characters": "length of these spans together, in characters",
    }
