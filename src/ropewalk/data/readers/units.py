"""Sources cut for parallel work: whole files, parts of large ones, several small ones together.

Each file has to be read once anyway, for its hash; where its lines can be cut is found on the way.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ropewalk.data.readers.kinds import TABLES, Kind, kind_of
from ropewalk.data.readers.source import InputFile, Source
from ropewalk.data.readers.streams import opened
from ropewalk.data.readers.tables import check_columns, row_groups, table_schema
from ropewalk.errors import UserError

UNIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Part of a file, from `start` to `end` (None: its end): bytes of plain JSONL, row groups of Parquet;
    other files are whole. `first_line` is the line or row that is the first in it; `size` in stored bytes."""

    file: InputFile
    start: int = 0
    end: int | None = None
    first_line: int = 1
    size: int = field(default=0, compare=False)

    def key(self) -> list[Any]:
        """For fingerprints, as JSON: not where the file lies."""
        return [self.file.name, self.start, self.end, self.first_line]


Unit = tuple[Piece, ...]
"""What one worker reads at a time."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a file says: its SHA-256 (hexadecimal), and its pieces."""

    sha256: str
    pieces: tuple[Piece, ...]


def survey(file: InputFile, size: int = UNIT_BYTES) -> Survey:
    """One pass over the bytes. Plain JSONL is cut at the first line that begins at or after each multiple of
    `size` bytes, Parquet between row groups. Raises UserError where the file cannot be read."""
    content = kind_of(file.name) or Kind("")
    digest, lines, length = hashlib.sha256(), 0, 0
    cuts = [(0, 1)]  # (byte, line) that a piece begins with
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with opened(file.path) as raw:
        plain = content == ("jsonl", None) and raw.seekable()
        while count := raw.readinto(buffer):
            digest.update(view[:count])
            if plain:
                ends = np.frombuffer(buffer, np.uint8, count) == 10
                if length + count >= _next(cuts[-1][0], size):
                    cuts += _cuts(np.flatnonzero(ends), length, lines, cuts[-1][0], size)
                lines += int(np.count_nonzero(ends))
            length += count
        if content.content == "parquet" and length and raw.seekable():
            return Survey(digest.hexdigest(), tuple(_group_pieces(file, raw, size)))
    if not plain:
        return Survey(digest.hexdigest(), (Piece(file, size=length),))
    while len(cuts) > 1 and cuts[-1][0] >= length:  # the last line's end is no line's beginning
        cuts.pop()
    ends_at = [start for start, _ in cuts[1:]] + [length]
    pieces = (
        Piece(file, start, end, line, end - start) for (start, line), end in zip(cuts, ends_at, strict=True)
    )
    return Survey(digest.hexdigest(), tuple(pieces))


def _next(cut: int, size: int) -> int:
    return (cut // size + 1) * size


def _cuts(ends: np.ndarray, at: int, lines: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """What follows the cut at byte `last`; `ends` are the line ends of a chunk that begins at byte `at` and
    after `lines` lines."""
    beginnings = ends + (at + 1)
    while (i := int(np.searchsorted(beginnings, _next(last, size)))) < len(beginnings):
        last = int(beginnings[i])
        yield last, lines + i + 2


def _group_pieces(file: InputFile, raw: Any, size: int) -> Iterator[Piece]:
    start, first, row, weight = 0, 1, 1, 0
    groups = row_groups(raw, file.path)
    for i, (rows, stored) in enumerate(groups):
        if weight and weight + stored > size:
            yield Piece(file, start, i, first, weight)
            start, first, weight = i, row, 0
        row += rows
        weight += stored
    yield Piece(file, start, len(groups), first, weight)


def cut(
    source: Source,
    files: Sequence[InputFile],
    bytes: int = UNIT_BYTES,
    surveys: Sequence[Survey] | None = None,
) -> list[Unit]:
    """Units of about so many bytes as stored; one after the other they are the source. `surveys` are those
    of the files, made with the same size; else they are made now. Raises UserError as `survey`, and for
    tables that do not agree."""
    agree(source, files)
    units: list[Unit] = []
    held: list[Piece] = []
    weight = 0
    for piece in (p for s in surveys or [survey(file, bytes) for file in files] for p in s.pieces):
        if held and weight + piece.size > bytes:
            units.append(tuple(held))
            held, weight = [], 0
        held.append(piece)
        weight += piece.size
    return [*units, tuple(held)] if held else units


def agree(source: Source, files: Sequence[InputFile]) -> None:
    """Raises UserError where a table cannot hold documents, or two have them in other columns or types."""
    first: tuple[str, Any, dict[str, str]] | None = None
    for file in files:
        kind = kind_of(file.name)
        if kind is None or kind.content not in TABLES:
            continue
        with opened(file.path) as raw:
            schema = table_schema(raw, file.path, kind.content)
        columns = source.named.resolve(tuple(schema.names), file.path)
        types = check_columns(schema, columns, file.path)
        first = first or (file.path, columns, types)
        other, other_columns, other_types = first
        if columns != other_columns or any(other_types.get(role, t) != t for role, t in types.items()):
            mine, its = _listed(columns, types), _listed(other_columns, other_types)
            raise UserError(f"{file.path}: has {mine}, and {other} has {its}; give them as two sources")


def _listed(columns: Any, types: dict[str, str]) -> str:
    named = {role: name for role, name in columns._asdict().items() if name is not None}
    return ", ".join(f"{name} ({types.get(role, 'null')})" for role, name in named.items())
