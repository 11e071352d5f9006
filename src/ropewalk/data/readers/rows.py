"""Rows of JSONL and of delimited text, each with its line and its bytes."""

import csv
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ropewalk.data.readers.streams import MAX_ROW_BYTES, Stream, lines
from ropewalk.errors import UserError

BOM = b"\xef\xbb\xbf"
TOO_LONG = f"is longer than {MAX_ROW_BYTES:,} bytes; is a line end missing?"


class Row(NamedTuple):
    """`value` is the row, or what is wrong with it; `line` (or the row's number) counts from 1; bytes `start`
    to `end` of the file hold it, -1 where that means nothing."""

    line: int
    value: dict[str, Any] | str
    start: int = -1
    end: int = -1


Rows = Iterator[Row]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""RFC 8259 leaves it to the reader what a key that is there twice means: here it is an error."""


def said(error: Exception) -> str:
    """What json's decoder has against a text."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def object_or_reason(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"must be a JSON object, is {type(value).__name__}"


def read_jsonl(stream: Stream, at: int = 0, end: int | None = None, line: int = 1) -> Rows:
    """Lines end in \\n (a \\r before it is white space). `at` and `line` are those of the stream's next byte;
    lines that begin at or after byte `end` are not read."""
    for start, stop, raw in lines(stream, at, end, limit=MAX_ROW_BYTES):
        if start == 0 and raw is not None and raw.startswith(BOM):
            start, raw = len(BOM), raw.removeprefix(BOM)
        if raw is None:
            yield Row(line, TOO_LONG, start, stop)
        elif raw and not raw.isspace():
            yield Row(line, _parsed(raw), start, stop)
        line += 1


def _parsed(raw: bytes) -> dict[str, Any] | str:
    try:
        return object_or_reason(DECODER.decode(raw.decode()))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start:,} of the line); convert the file to UTF-8"
    except (ValueError, RecursionError) as error:
        hint = "; end lines with \\n, not with \\r alone" if b"\r" in raw.rstrip() else ""
        if getattr(error, "pos", -1) >= len(raw.decode().rstrip()) or said(error).startswith("Unterminated"):
            hint = "; the object does not end on this line"
        return f"not valid JSON ({said(error)}){hint}"


def read_delimited(stream: Stream, path: str, delimiter: str) -> Rows:
    """CSV (RFC 4180), its first row the names of the columns; \\r\\n, \\n and \\r all end a row. With a tab
    as the delimiter a field is quoted in the same way. Raises UserError where rows cannot be told apart."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _Text(stream)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line, start = reader.line_num + 1, text.position
        text.bad = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not valid CSV ({error})") from None
        if fields is None:
            return
        if text.bad is not None and header is None:
            raise UserError(f"{path}:{line}: {text.bad}")
        if text.bad is not None:
            yield Row(line, text.bad, start, text.position)
        elif header is None:
            header = fields
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise UserError(f"{path}:{line}: two columns are called {twice[0]!r}; rename one")
        elif fields and len(fields) != len(header):
            reason = f"has {len(fields)} fields; the header has {len(header)}"
            yield Row(line, reason, start, text.position)
        elif fields:
            yield Row(line, dict(zip(header, fields, strict=True)), start, text.position)


class _Text:
    """The lines that csv's reader asks for: `position` is the first byte that it was not given; `bad` is what
    is wrong with one of them."""

    def __init__(self, stream: Stream) -> None:
        self.lines = self._lines(stream)
        self.position = 0
        self.bad: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self.lines

    def _lines(self, stream: Stream) -> Iterator[str]:
        for start, stop, raw in lines(stream, limit=MAX_ROW_BYTES):
            if raw is None:
                self.position, self.bad = stop + 1, TOO_LONG
                yield ""
                continue
            if start == 0 and raw.startswith(BOM):
                self.position, raw = len(BOM), raw.removeprefix(BOM)
            for part in (raw + b"\n").splitlines(keepends=True):
                self.position += len(part)
                try:
                    text = part.decode()
                except UnicodeDecodeError as error:
                    self.bad = f"not UTF-8 (byte {error.start:,} of a line); convert the file to UTF-8"
                    text = part.decode(errors="replace")
                yield text
