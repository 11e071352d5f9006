"""Web archives (ISO 28500): HTML that was got with status 200, and texts of it (Common Crawl's WET files)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ropewalk.data.readers.pages import MAX_PAGE_BYTES, main_text
from ropewalk.data.readers.streams import Stream, Unreadable, from_extra

_HTML = ("text/html", "application/xhtml+xml")


class Page(NamedTuple):
    """`number` counts all records from 1; bytes `start` to `end` of the (decompressed) file hold it. `text`
    is empty for a page without main text, which in a crawl is no mistake; `reason` is what is wrong."""

    number: int
    url: str
    start: int
    end: int
    text: str
    reason: str | None = None


def read_warc(stream: Stream, path: str) -> Iterator[Page]:
    """Raises Unreadable where what follows is no record any more."""
    iterator = from_extra("warcio.archiveiterator", path)
    failed = from_extra("warcio.exceptions", path).ArchiveLoadFailed
    counted = _Counted(stream)
    records = iterator.ArchiveIterator(counted)
    number = 0
    while True:
        try:
            record = next(records, None)
        except (failed, ValueError, AttributeError, AssertionError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Unreadable(f"no WARC record after record {number:,} ({said})") from None
        if record is None:
            return
        number += 1
        reason, text = None, None
        try:
            text = _text(record, path)
        except Unreadable as error:
            counted.raise_if_ended()
            reason = str(error)
        start, length = records.get_record_offset(), records.get_record_length()
        if text is not None or reason is not None:
            url = record.rec_headers.get_header("WARC-Target-URI") or ""
            yield Page(number, url.strip("<>"), start, start + length, text or "", reason)


class _Counted:
    """A stream that knows where it is, and whether it broke off."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0
        self.failure: Unreadable | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            data = self.stream.read(size)
        except Unreadable as failure:
            self.failure = failure
            raise
        self.at += len(data)
        return data

    def tell(self) -> int:
        return self.at

    def raise_if_ended(self) -> None:
        if self.failure is not None:
            raise self.failure


def _text(record: Any, path: str) -> str | None:
    """None for a record that is not to be read."""
    kind = record.content_type.split(";")[0].strip().lower() if record.content_type else ""
    if record.rec_type == "conversion" and kind == "text/plain":
        return _content(record).decode("utf-8", "replace")
    if record.rec_type != "response" or record.http_headers is None:
        return None
    about = record.http_headers.get_header("Content-Type") or ""
    if record.http_headers.get_statuscode() != "200" or about.split(";")[0].strip().lower() not in _HTML:
        return None
    page = _content(record)
    charset = about.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    try:
        return main_text(page.decode(charset), path)  # what the server says, where it is true
    except (LookupError, UnicodeDecodeError, ValueError):
        return main_text(page, path)


def _content(record: Any) -> bytes:
    try:
        raw = record.content_stream().read(MAX_PAGE_BYTES + 1)
    except Unreadable:
        raise
    except Exception as error:  # an unknown encoding of the content, chunks that are none
        raise Unreadable(f"its content cannot be read ({error})") from None
    if len(raw) > MAX_PAGE_BYTES:
        raise Unreadable(f"is longer than {MAX_PAGE_BYTES:,} bytes")
    return raw
