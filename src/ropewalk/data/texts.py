"""The plain texts of sources, one after the other: for what learns from texts or measures on them."""

from collections.abc import Callable, Iterator
from itertools import islice

from ropewalk.data.readers import Source, files_of, read_source
from ropewalk.data.records import BadRow, Record
from ropewalk.errors import UserError

BATCH_TEXTS, BATCH_CHARACTERS = 512, 1 << 21
Progress = Callable[[str, int, int], None]


def records_of(source: Source) -> Iterator[Record]:
    """The records of a source that have any text. Raises UserError for a row that cannot be used, naming its
    file and line, and for a source with no text at all."""
    files, _ = files_of(source)
    found = False
    for record in read_source(source, files):
        if isinstance(record, BadRow):
            raise UserError(f"{record}; correct the row or take it out")
        if record.plain:
            found = True
            yield record
    if not found:
        raise UserError(f"{source.path}: no text in it (data source {source.name})")


def batches_of(source: Source, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of a source, some MB at a time. `progress(what, texts done, of)` knows no end: of is 0."""
    records, done = records_of(source), 0
    while batch := _batch(records):
        done += len(batch)
        if progress is not None:
            progress(f"read {source.name}, texts", done, 0)
        yield batch


def _batch(records: Iterator[Record]) -> list[Record]:
    batch: list[Record] = []
    characters = 0
    for record in islice(records, BATCH_TEXTS):
        batch.append(record)
        characters += record.characters
        if characters >= BATCH_CHARACTERS:
            break
    return batch
