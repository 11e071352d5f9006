"""Files to records, streaming: JSONL, JSON, Parquet, CSV, folders of text; with file and line for errors.

A row that cannot be used comes out as a `BadRow` in its place, so that whoever reads decides whether it
may be skipped. What no row can be blamed for (a missing file, missing columns) is a UserError at once.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.data.records import BadRow, Columns, Record, record_from_row
from ropewalk.errors import UserError

TEXT = (".txt", ".md", ".py")
ROWS = (".jsonl", ".json", ".parquet", ".csv")
MAX_CSV_FIELD = 1 << 30


@dataclass(frozen=True)
class Source:
    """One set of documents: a file, a folder of text or a glob; and its columns, where they are said."""

    path: str
    name: str
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def named(self) -> Columns:
        return Columns(self.text, self.messages, self.prompt, self.completion)


@dataclass(frozen=True)
class InputFile:
    """A file of a source; `name` is its path below the source's own, with forward slashes."""

    path: Path
    name: str


def files_of(source: Source) -> tuple[list[InputFile], list[Path]]:
    """(files to read, in a fixed order; files of folders that are left alone for their extension).

    Raises UserError for a path that is not there, matches nothing or has an extension that no reader knows.
    """
    path = Path(source.path).expanduser()
    if path.exists():
        found, base = [path], path if path.is_dir() else path.parent
    else:
        fixed = re.split(r"[*?\[]", str(path), maxsplit=1)[0]
        base = Path(fixed).parent if fixed and not fixed.endswith(os.sep) else Path(fixed)
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            kind = "matches no file" if glob.has_magic(str(path)) else "no such file or folder"
            raise UserError(f"{source.path}: {kind} (data source {source.name})")
    files: list[InputFile] = []
    ignored: list[Path] = []
    for item in found:
        if item.is_dir():
            inside, others = _walk(item)
            files += [InputFile(p, p.relative_to(base).as_posix()) for p in inside]
            ignored += others
        elif item.suffix.lower() in TEXT + ROWS:
            files.append(InputFile(item, item.relative_to(base).as_posix()))
        else:
            raise UserError(f"{item}: unknown extension {item.suffix!r}; known are {', '.join(TEXT + ROWS)}")
    files = list({file.path: file for file in files}.values())
    if not files:
        hint = ""
        if any(p.suffix.lower() in ROWS for p in ignored):
            hint = f"; to read its data files, give a glob such as {source.path.rstrip('/')}/*.jsonl"
        raise UserError(f"{source.path}: no {', '.join(TEXT)} file in this folder{hint}")
    return files, ignored


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Text files below a folder, sorted, and the rest. Hidden files and folders are not looked at."""
    inside: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        inside += [Path(where, name) for name in names if not name.startswith(".")]
    inside.sort(key=lambda p: p.relative_to(folder).parts)
    texts = [p for p in inside if p.suffix.lower() in TEXT]
    return texts, [p for p in inside if p.suffix.lower() not in TEXT]


def read_source(source: Source, files: list[InputFile]) -> Iterator[Record | BadRow]:
    """The records of a source's files, one file after the other, memory not growing with the input
    (but a JSON array is read whole). Raises UserError for what makes a file unreadable."""
    for file in files:
        suffix = file.path.suffix.lower()
        prefix = file.name if file.name == source.name else f"{source.name}/{file.name}"
        try:
            if suffix in TEXT:
                yield _read_text(file, source, prefix)
            else:
                yield from _records(_ROW_READERS[suffix](file.path), file, source, prefix)
        except OSError as error:
            raise UserError(f"{file.path}: {error.strerror or error}") from None


Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""(line or row number from 1, row) or (number, what is wrong with it)."""


def _records(rows: Rows, file: InputFile, source: Source, prefix: str) -> Iterator[Record | BadRow]:
    columns: Columns | None = None
    for number, row in rows:
        where, name = f"{file.path}:{number}", f"{prefix}:{number}"
        if isinstance(row, str):
            yield BadRow(where, row)
            continue
        if columns is None:
            columns = source.named.resolve(tuple(row), str(file.path))
        try:
            yield record_from_row(row, columns, id=name, source=source.name, where=where)
        except ValueError as error:
            yield BadRow(where, str(error))


def _read_text(file: InputFile, source: Source, name: str) -> Record | BadRow:
    if source.named != Columns():
        raise UserError(f"{file.path}: is a text file; data source {source.name} names columns")
    raw = file.path.read_bytes()
    zero = raw.find(b"\0")
    if zero >= 0:
        return BadRow(
            str(file.path), f"not a text file (NUL byte at offset {zero:,}); remove it or rename it"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow(str(file.path), f"not UTF-8 text (byte at offset {error.start:,}); convert it to UTF-8")
    return Record(name, source.name, str(file.path), text=text)


def _read_jsonl(path: Path) -> Rows:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 (byte {error.start:,} of the line); convert the file to UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, f"not valid JSON ({_said(error)})"
            else:
                yield (
                    number,
                    row if isinstance(row, dict) else f"must be a JSON object, is {type(row).__name__}",
                )


def _read_json(path: Path) -> Rows:
    """A JSON array of objects, each numbered by the line it starts on; anything else is read as JSONL."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(path)
        return
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {error.start:,}); convert the file to UTF-8"
        ) from None
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0

    def skip(position: int) -> int:
        nonlocal line, counted
        match = space.match(text, position)
        assert match is not None
        line += text.count("\n", counted, match.end())
        counted = match.end()
        return counted

    at = skip(at)
    while not text.startswith("]", at):
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", counted))
            raise UserError(f"{path}:{line}: not valid JSON ({_said(error)})") from None
        yield line, row if isinstance(row, dict) else f"must be a JSON object, is {type(row).__name__}"
        at = skip(end)
        if text.startswith(",", at):
            at = skip(at + 1)
        elif not text.startswith("]", at):
            raise UserError(f"{path}:{line}: not valid JSON (a comma or the end of the array is missing)")


def _said(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(MAX_CSV_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    yield line, f"has {len(fields)} fields; the header has {len(header)}"
                elif fields:
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except UnicodeDecodeError:
            raise UserError(
                f"{path}:{line}: not UTF-8 here or soon after; convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


_ROW_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_rows(path: Path) -> Rows:
    """The rows of one file of `ROWS`, whatever their columns."""
    return _ROW_READERS[path.suffix.lower()](path)
