"""Files to records, streaming: rows, pages, text, archives of them; here or behind a URL.

A row that cannot be used comes out as a `BadRow` in its place, so that whoever reads decides whether it
may be skipped. What no row can be blamed for (a missing file, missing columns) is a UserError at once.
"""

from ropewalk.data.readers.read import id_of, read_rows, read_source, read_unit
from ropewalk.data.readers.source import InputFile, Source, files_of
from ropewalk.data.readers.streams import Stamp, stamp
from ropewalk.data.readers.units import Unit, cut, survey

__all__ = [
    "InputFile",
    "Source",
    "Stamp",
    "Unit",
    "cut",
    "files_of",
    "id_of",
    "read_rows",
    "read_source",
    "read_unit",
    "stamp",
    "survey",
]
