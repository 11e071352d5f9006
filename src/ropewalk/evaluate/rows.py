"""Records of an evaluation file, read as training data is; here a bad row is always an error."""

from collections.abc import Iterator
from pathlib import Path

from ropewalk.data.readers import Source, files_of, read_source
from ropewalk.data.records import BadRow, Record
from ropewalk.errors import UserError


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, folder or glob. Raises UserError that names file and line of a bad row."""
    source = Source(str(path), Path(path).name)
    for record in read_source(source, files_of(source)[0]):
        if isinstance(record, BadRow):
            raise UserError(str(record))
        yield record
