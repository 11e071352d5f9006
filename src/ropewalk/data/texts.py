"""The plain texts of sources, one after the other: for what learns from texts or measures on them."""

from collections.abc import Iterator

from ropewalk.data.parts import Progress
from ropewalk.data.readers import Source, files_of, read_source
from ropewalk.data.records import BadRow, Record, in_batches
from ropewalk.errors import UserError

BATCH_TEXTS, BATCH_CHARACTERS = 512, 1 << 21


def batches_of(source: Source, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of a source that have any text, some MB at a time. `progress(what, files done, of)`.

    Raises UserError for a row that cannot be used, naming its file and line, and for a source without text.
    """
    records = _records(source, progress)
    found = False
    for batch in in_batches(records, lambda record: record.characters, BATCH_CHARACTERS, BATCH_TEXTS):
        found = True
        yield batch
    if not found:
        raise UserError(f"{source.path}: no text in it (data source {source.name})")


def _records(source: Source, progress: Progress | None) -> Iterator[Record]:
    files, _ = files_of(source)
    for done, file in enumerate(files):
        if progress is not None:
            progress(f"read {source.name}, files", done, len(files))
        for record in read_source(source, [file]):
            if isinstance(record, BadRow):
                raise UserError(f"{record}; correct the row or take it out")
            if record.plain:
                yield record
