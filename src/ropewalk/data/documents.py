"""Text records on disk: what was read of one unit of the input, as a Parquet file, and read again in batches.

Attributes lie beside it in files of their own, with a row for each of its rows (see attributes.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.data.part_files import PART, open_part, reading
from ropewalk.data.readers import Source, Stamp, Unit, id_of, read_unit, stamp
from ropewalk.data.records import BadRow, Record, in_batches
from ropewalk.errors import RopewalkError, UserError

VERSION = 2
"""Counted up when the same input would give other records."""
GROUP_ROWS, GROUP_CHARACTERS = 1024, 1 << 23
_SCHEMA = pa.schema(
    {
        **{name: pa.string() for name in ("id", "source", "file")},
        **{name: pa.int64() for name in ("line", "start", "end")},
        **{name: pa.string() for name in ("text", "messages", "prompt", "completion")},
        "url": pa.string(),
        "hash": pa.uint64(),
    }
)


@dataclass(frozen=True)
class ReadUnit:
    """The task that reads a unit. At most `allowed` bad rows may be in it; `stamps` are those of its files
    when their content was hashed: what has another by now is not what the task's path says."""

    path: Path
    weight: int
    source: Source
    unit: Unit
    stamps: Mapping[str, Stamp]
    repair: bool
    allowed: int

    @property
    def files(self) -> dict[str, str]:
        """Names of its files, and where they lie."""
        return {piece.file.name: piece.file.path for piece in self.unit}

    def make(self, path: Path) -> None:
        bad: list[tuple[str, str]] = []
        with pq.ParquetWriter(path, _SCHEMA, **PART) as writer:
            groups = in_batches(self._records(bad), lambda row: row.characters, GROUP_CHARACTERS, GROUP_ROWS)
            for rows in groups:
                writer.write_table(_table(rows))
            writer.add_key_value_metadata({"bad": json.dumps(bad, ensure_ascii=False)})
        for name, before in self.stamps.items():
            if stamp(name) != before:
                raise RopewalkError(f"{name}: changed while it was read; prepare the data again")

    def _records(self, bad: list[tuple[str, str]]) -> Iterator[Record]:
        """Puts the bad rows into `bad`, as (id, reason)."""
        for piece in self.unit:
            for item in read_unit(self.source, (piece,)):
                if isinstance(item, Record):
                    yield repaired(item) if self.repair else item
                    continue
                at = item.where.removeprefix(piece.file.path)
                bad.append((id_of(self.source, piece.file) + at, item.reason))
                if len(bad) > self.allowed:
                    raise UserError(too_many(item, self.allowed))


def too_many(row: BadRow, allowed: int) -> str:
    limit = f"data.max_bad_rows is {allowed:,}"
    return f"{row}; {limit if allowed else 'set data.max_bad_rows to skip such rows'}"


def repaired(record: Record) -> Record:
    """With mojibake undone, in Unicode's composed form, without control characters (see clean.repair)."""
    from ropewalk.clean.repair import repair

    return record.with_contents([repair(content) for content in record.contents])


def _table(rows: Sequence[Record]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names[:7]}
    columns["messages"] = [
        None if row.messages is None else json.dumps(row.messages, ensure_ascii=False) for row in rows
    ]
    columns |= {name: [getattr(row, name) for row in rows] for name in ("prompt", "completion", "url")}
    columns["hash"] = [row.content_hash() for row in rows]
    return pa.table(columns, schema=_SCHEMA)


class Documents:
    """The records of one unit; `files` says where its files lie (name to path), for messages.

    Raises RopewalkError, naming the file, for one that cannot be read.
    """

    def __init__(self, path: Path, files: Mapping[str, str] | None = None) -> None:
        self.path, self.files = path, files or {}
        self._file = open_part(path)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def bad(self) -> list[BadRow]:
        """Named as ids are: the same wherever the files lie."""
        with reading(self.path):
            return [BadRow(*row) for row in json.loads(self._file.metadata.metadata[b"bad"])]

    def columns(self, *names: str) -> pa.Table:
        """Of all rows; not for texts, which are read in batches."""
        with reading(self.path):
            return self._file.read(columns=list(names))

    def batches(self) -> Iterator[list[Record]]:
        """The records, some MB at a time."""
        for group in range(self._file.num_row_groups):
            yield self._group(group)

    def at(self, rows: np.ndarray) -> list[Record]:
        """Some records, in the order of `rows` [n]; reads only the groups in which they lie."""
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        begins = np.concatenate([[0], np.cumsum(sizes)])
        groups = np.searchsorted(begins, rows, side="right") - 1
        found: dict[int, Record] = {}
        for group in np.unique(groups).tolist():
            records = self._group(group)
            found |= {row: records[row - begins[group]] for row in rows[groups == group].tolist()}
        return [found[row] for row in rows.tolist()]

    def _group(self, group: int) -> list[Record]:
        with reading(self.path):
            rows = self._file.read_row_group(group, columns=_SCHEMA.names[:-1]).to_pylist()
            return [self._record(row) for row in rows]

    def _record(self, row: dict[str, Any]) -> Record:
        messages = row.pop("messages")
        name = row["file"]
        file = name if name in self.files else name.split("!", 1)[0]  # else it is a member of an archive
        where = self.files.get(file, file) + name.removeprefix(file)
        return Record(
            **row,
            where=f"{where}:{row['line']}" if row["line"] else where,
            messages=None if messages is None else tuple(json.loads(messages)),
        )
