"""The records of sources and of pieces of them: which reader for what, and where each record is from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ropewalk.data.readers.archives import members
from ropewalk.data.readers.json_array import read_json
from ropewalk.data.readers.kinds import ARCHIVES, DOCUMENTS, TABLES, Kind, kind_of
from ropewalk.data.readers.pages import read_html, read_pdf, read_text
from ropewalk.data.readers.rows import Rows, read_delimited, read_jsonl
from ropewalk.data.readers.source import InputFile, Source
from ropewalk.data.readers.streams import Unreadable, inflated, opened, seekable
from ropewalk.data.readers.tables import check_columns, read_arrow, read_parquet, table_schema
from ropewalk.data.readers.units import Piece, Unit, agree
from ropewalk.data.readers.warc import read_warc
from ropewalk.data.records import BadRow, Columns, Record, record_from_row
from ropewalk.errors import UserError

Records = Iterator[Record | BadRow]


def read_source(source: Source, files: Sequence[InputFile]) -> Records:
    """The records of a source's files, one file after the other, memory not growing with the input.
    Raises UserError for what makes a file unreadable."""
    agree(source, files)
    yield from read_unit(source, tuple(Piece(file) for file in files))


def read_unit(source: Source, unit: Unit) -> Records:
    """The records of one unit of `cut`; the units one after the other give what `read_source` gives."""
    for piece in unit:
        place, kind = _Place(source, piece, id_of(source, piece.file)), kind_of(piece.file.name)
        if kind is None:
            raise UserError(f"{place.path}: no reader knows this kind of file")
        columns = _columns_of_head(place) if piece.start and kind.content == "jsonl" else None
        with opened(place.path) as raw:
            yield from _content(place, kind, raw, columns)


def id_of(source: Source, file: InputFile) -> str:
    """What the ids of a file's records begin with, wherever it lies."""
    return file.name if file.name == source.name else f"{source.name}/{file.name}"


@dataclass(frozen=True)
class _Place:
    """A piece of a file or of a member; `id` is what its records' ids begin with."""

    source: Source
    piece: Piece
    id: str

    @property
    def path(self) -> str:
        """For messages."""
        return self.piece.file.path

    def member(self, name: str) -> "_Place":
        file = InputFile(f"{self.path}!{name}", f"{self.piece.file.name}!{name}")
        return _Place(self.source, Piece(file), f"{self.id}!{name}")

    def record(self, line: int = 0, start: int = -1, end: int = -1, before: int = 0) -> partial[Record]:
        """Record, less its content; so many rows `before` it are on the same line."""
        number = (f":{line}" if line else "") + (f".{before + 1}" if before else "")
        origin = {"file": self.piece.file.name, "line": line, "start": start, "end": end}
        return partial(Record, self.id + number, self.source.name, self.path + number, **origin)  # type: ignore[arg-type]


def read_rows(file: InputFile) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, row, or what is wrong with it) of a file, whatever columns it has; of a document its text.
    Raises UserError for an archive, and as `read_source`."""
    kind = kind_of(file.name)
    if kind is None or kind.content in (*ARCHIVES, "warc"):
        raise UserError(f"{file.path}: rows are read of tables, JSON and documents only")
    place = _Place(Source("", ""), Piece(file), file.name)
    with opened(file.path) as raw:
        try:
            stream = inflated(raw, file.path, kind.compression)
            if kind.content in DOCUMENTS:
                yield file.path, {"text": _document(place, kind.content, stream).text}
                return
            if kind.content in TABLES:
                rows = _table(place, kind.content, stream, None)
            else:
                rows = _rows(place, kind.content, stream)
            yield from ((f"{file.path}:{row.line}", row.value) for row in rows)
        except Unreadable as reason:
            yield file.path, str(reason)


def _content(place: _Place, kind: Kind, raw: Any, columns: Columns | None = None) -> Records:
    content, source = kind.content, place.source
    if content in (*DOCUMENTS, "warc") and source.named != Columns():
        raise UserError(f"{place.path}: is a {content} file; data source {source.name} names columns")
    try:
        stream = inflated(raw, place.path, kind.compression)
        if content in DOCUMENTS:
            yield _document(place, content, stream)
        elif content == "warc":
            yield from _warc(place, stream)
        elif content in ARCHIVES:
            for name, inner, member in members(stream, place.path, content):
                # Who names columns wants the rows, not the README beside them.
                if inner.content not in DOCUMENTS or source.named == Columns():
                    yield from _content(place.member(name), inner, member)
        elif content in TABLES:
            with seekable(stream) as file:
                schema = table_schema(file, place.path, content)
                columns = source.named.resolve(tuple(schema.names), place.path)
                check_columns(schema, columns, place.path)
                yield from _records(_table(place, content, file, columns), place, columns)
        else:
            yield from _records(_rows(place, content, stream), place, columns)
    except Unreadable as reason:
        yield BadRow(place.path, str(reason))


def _document(place: _Place, content: str, stream: Any) -> Record:
    if content == "text":
        text, size = read_text(stream)
        return place.record(0, 0, size)(text=text)
    if content == "html":
        return place.record()(text=read_html(stream, place.path))
    with seekable(stream) as file:
        return place.record()(text=read_pdf(file, place.path))


def _warc(place: _Place, stream: Any) -> Records:
    for page in read_warc(stream, place.path):
        if page.reason is not None:
            yield BadRow(f"{place.path}:{page.number} ({page.url})", page.reason)
        else:
            yield place.record(page.number, page.start, page.end)(text=page.text, url=page.url)


def _table(place: _Place, content: str, raw: Any, columns: Columns | None) -> Rows:
    """`columns`: None for all there are."""
    piece = place.piece
    wanted = None if columns is None else [name for name in columns if name is not None]
    if content == "arrow":
        return read_arrow(raw, place.path, wanted)
    return read_parquet(raw, place.path, wanted, piece.start, piece.end, piece.first_line)


def _rows(place: _Place, content: str, stream: Any) -> Rows:
    piece = place.piece
    if content == "json":
        return read_json(stream, place.path)
    if content != "jsonl":
        return read_delimited(stream, place.path, "," if content == "csv" else "\t")
    if piece.start:
        stream.seek(piece.start)
    return read_jsonl(stream, piece.start, piece.end, piece.first_line)


def _records(rows: Rows, place: _Place, columns: Columns | None) -> Records:
    line = before = 0
    for row in rows:
        before = before + 1 if row.line == line else 0
        line = row.line
        make = place.record(line, row.start, row.end, before)
        try:
            if isinstance(row.value, str):
                raise ValueError(row.value)
            if columns is None:
                columns = place.source.named.resolve(tuple(row.value), place.path)
            yield record_from_row(row.value, columns, make)
        except ValueError as error:
            yield BadRow(f"{place.path}:{row.line}", str(error))


def _columns_of_head(place: _Place) -> Columns | None:
    """What the file's first good row decides, also for pieces that do not begin with it."""
    with opened(place.path) as raw:
        for row in read_jsonl(raw):
            if isinstance(row.value, dict):
                return place.source.named.resolve(tuple(row.value), place.path)
    return None
