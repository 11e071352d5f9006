"""The Parquet files in parts/, and the ledger: each page has a checksum, which every reader compares."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.errors import RopewalkError

PART: Mapping[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How they are written."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises RopewalkError, naming the file, for one that the body cannot read."""
    try:
        yield
    # What is damaged shows itself in errors of many kinds.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        gone = isinstance(error, FileNotFoundError)
        why = "no such file" if gone else (str(error) or type(error).__name__).splitlines()[0]
        raise RopewalkError(f"{path}: cannot be read ({why}); delete it and prepare again") from None


def open_part(path: Path) -> pq.ParquetFile:
    with reading(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def read_columns(paths: Iterable[Path], names: Collection[str]) -> dict[str, pa.ChunkedArray]:
    """Columns by their names, each from the first of the files that has it."""
    found: dict[str, pa.ChunkedArray] = {}
    for path in paths:
        file = open_part(path)
        inside = [name for name in file.schema_arrow.names if name in names and name not in found]
        if inside:
            with reading(path):
                found |= zip(inside, file.read(columns=inside).columns, strict=True)
    return found


def read_part(path: Path, columns: Sequence[str] | None = None, **options: Any) -> pa.Table:
    """Columns of it, or all."""
    with reading(path):
        names = None if columns is None else list(columns)
        return pq.read_table(path, columns=names, page_checksum_verification=True, **options)


def part_schema(path: Path) -> pa.Schema:
    with reading(path):
        return pq.read_schema(path)
