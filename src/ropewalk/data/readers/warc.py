"""Web archives (ISO 28500): HTML that was got with status 200, and texts of it (Common Crawl's WET files).

Records are told apart here and not by warcio, which reads lines without a limit and past a missing end;
what is in a record (HTTP, its encodings) is warcio's part.
"""

import io
import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ropewalk.data.readers.pages import MAX_PAGE_BYTES, main_text
from ropewalk.data.readers.streams import CHUNK, Stream, Unreadable, from_extra

MAX_HEAD_BYTES = 1 << 16
_HTML = ("text/html", "application/xhtml+xml")
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_HEAD_ENDS = re.compile(rb"\r?\n\r?\n")


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
    """Raises Unreadable where what follows is no record any more, or not all of one."""
    loader = from_extra("warcio.recordloader", path).ArcWarcRecordLoader()
    reader = from_extra("warcio.bufferedreaders", path).BufferedReader
    logging.getLogger("warcio").setLevel(logging.CRITICAL)
    source = _Buffer(stream)
    number = 0
    while source.begin(number):
        number += 1
        start = source.at
        head, length = source.head(number)
        raw = head + source.take(min(length, MAX_PAGE_BYTES + MAX_HEAD_BYTES))
        source.skip(length - (len(raw) - len(head)))
        url, text, reason = "", None, None
        try:
            record = loader.parse_record_stream(reader(io.BytesIO(raw)), known_format="warc")
            url = (record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
            text = _text(record, path)
        except Unreadable as error:
            reason = str(error)
        except Exception as error:  # a parser of what comes from elsewhere, which fails in many ways
            reason = f"not a readable WARC record ({str(error).strip() or type(error).__name__})"
        if text is not None or reason is not None:
            yield Page(number, url, start, source.at, text or "", reason)


class _Buffer:
    """The stream's next bytes; `at` is the place in the file of the first of them."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.at, self.held = stream, 0, b""

    def _more(self) -> bool:
        data = self.stream.read(CHUNK)
        self.held += data
        return bool(data)

    def take(self, size: int) -> bytes:
        parts, wanted = [], size
        while wanted:
            if not self.held and not self._more():
                raise Unreadable(f"ends in the middle of a record (at byte {self.at:,})")
            parts.append(self.held[:wanted])
            self.held = self.held[wanted:]
            self.at += len(parts[-1])
            wanted -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.take(min(size, CHUNK)))

    def begin(self, number: int) -> bool:
        """Goes to the next record; False at the end."""
        while True:
            rest = self.held.lstrip(b"\r\n")
            self.at += len(self.held) - len(rest)
            self.held = rest
            if len(rest) >= 5:
                break
            if not self._more():
                if not self.held:
                    return False
                break
        if not self.held.startswith(b"WARC/"):
            raise Unreadable(f"no WARC record at byte {self.at:,}, after record {number:,}")
        return True

    def head(self, number: int) -> tuple[bytes, int]:
        """(a record's head, the bytes of its content)."""
        while (end := _HEAD_ENDS.search(self.held, 0, MAX_HEAD_BYTES)) is None:
            if len(self.held) > MAX_HEAD_BYTES or not self._more():
                raise Unreadable(f"record {number:,} at byte {self.at:,} has no end of its head")
        head = self.take(end.end())
        length = _LENGTH.search(head)
        if length is None:
            raise Unreadable(f"record {number:,} before byte {self.at:,} does not say its Content-Length")
        return head, int(length[1])


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
    except (LookupError, ValueError):
        return main_text(page, path)


def _content(record: Any) -> bytes:
    raw = record.content_stream().read(MAX_PAGE_BYTES + 1)
    if len(raw) > MAX_PAGE_BYTES:
        raise Unreadable(f"is longer than {MAX_PAGE_BYTES:,} bytes")
    return raw
