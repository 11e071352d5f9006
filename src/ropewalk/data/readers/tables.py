"""Parquet and Arrow files: only the columns that are asked for, some MB at a time; rows counted from 1."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ropewalk.data.readers.rows import Row, Rows
from ropewalk.data.readers.streams import seekable
from ropewalk.data.records import Columns
from ropewalk.errors import UserError

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 8 << 20


def table_schema(file: Any, path: str, content: str) -> "pyarrow.Schema":
    """Raises UserError for what is no such file."""
    with _naming(path, content), seekable(file) as stream:
        if content == "parquet":
            with _parquet(stream) as parquet:
                return parquet.schema_arrow
        return _arrow(stream)[0]


def check_columns(schema: "pyarrow.Schema", columns: Columns, path: str) -> dict[str, str]:
    """Role to type (text or a list) of the columns that hold a document; not of a column of nulls alone.
    Raises UserError for a column that cannot hold it."""
    from pyarrow import types

    found = {}
    for role, name in columns._asdict().items():
        if name is None:
            continue
        if len(schema.get_all_field_indices(name)) > 1:
            raise UserError(f"{path}: two columns are called {name}; rename one")
        whole = schema.field(name).type
        kind = whole.value_type if types.is_dictionary(whole) else whole
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            found[role] = "text"
        elif role == "messages" and (types.is_list(kind) or types.is_large_list(kind)):
            found[role] = "a list"
        elif not types.is_null(kind):
            wanted = "a list of {role, content}, or text" if role == "messages" else "text"
            raise UserError(f"{path}: the column {name} must be {wanted}, is {whole}")
    return found


def row_groups(file: Any, path: str) -> list[tuple[int, int]]:
    """(rows, bytes as stored) of each row group of a Parquet file."""
    with _naming(path, "parquet"), seekable(file) as stream, _parquet(stream) as parquet:
        about = parquet.metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        return [
            (group.num_rows, sum(group.column(i).total_compressed_size for i in range(group.num_columns)))
            for group in groups
        ]


def read_parquet(
    file: Any, path: str, columns: list[str] | None, start: int = 0, end: int | None = None, row: int = 1
) -> Rows:
    """The rows of row groups `start` to `end`; the first is numbered `row`. `columns`: None for all."""
    with _naming(path, "parquet"), seekable(file) as stream, _parquet(stream) as parquet:
        groups = range(start, parquet.metadata.num_row_groups if end is None else end)
        for group in groups:
            about = parquet.metadata.row_group(group)
            size = max(1, about.total_byte_size // max(1, about.num_rows))
            rows = min(1024, max(1, BATCH_BYTES // size))
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns):
                yield from _rows(batch, row)
                row += batch.num_rows


def read_arrow(file: Any, path: str, columns: list[str] | None) -> Rows:
    """The IPC file format (also called Feather version 2) and the stream format, which `datasets` saves."""
    with _naming(path, "arrow"), seekable(file) as stream:
        row = 1
        for batch in _arrow(stream)[1]:
            batch = batch if columns is None else batch.select(columns)
            for at in range(0, batch.num_rows, 1024):
                yield from _rows(batch.slice(at, 1024), row + at)
            row += batch.num_rows


def _rows(batch: "pyarrow.RecordBatch", first: int) -> Rows:
    try:
        batch.validate(full=True)  # an offset from elsewhere must not be followed unchecked
    except Exception as error:
        if "UTF8" not in str(error):
            raise
    try:
        values: list[dict[str, Any] | str] = batch.to_pylist()
    except UnicodeDecodeError:
        values = [_value(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for i, value in enumerate(values):
        yield Row(first + i, value)


def _value(row: "pyarrow.RecordBatch") -> dict[str, Any] | str:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start:,} of a column); write the file anew with valid text"


def _parquet(stream: Any) -> Any:
    import pyarrow.parquet

    # A buffer: column chunks are read as they are decoded, not whole.
    return pyarrow.parquet.ParquetFile(_native(stream), buffer_size=1 << 20, pre_buffer=False)


def _arrow(stream: Any) -> tuple["pyarrow.Schema", Iterator["pyarrow.RecordBatch"]]:
    import pyarrow.ipc

    native = _native(stream)
    source = pyarrow.OSFile(native) if isinstance(native, str) else native
    source.seek(0)
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    reader = pyarrow.ipc.open_stream(source)
    return reader.schema, iter(reader)


def _native(stream: Any) -> Any:
    """The path of a file of this machine, which Arrow reads without Python in between."""
    return stream.name if isinstance(stream, io.FileIO) and isinstance(stream.name, str) else stream


@contextmanager
def _naming(path: str, content: str) -> Iterator[None]:
    """What Arrow has against a file, in one line that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, and not Arrow's
            raise
        kind = "Parquet" if content == "parquet" else "Arrow"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable {kind} file ({said})") from None
