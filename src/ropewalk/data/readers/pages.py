"""Files that are one document each: text, HTML pages, PDF. What is none is refused with Unreadable."""

import logging
from typing import Any

from ropewalk.data.readers.streams import MAX_ROW_BYTES, Stream, Unreadable, from_extra, whole

MAX_PAGE_BYTES = 32 << 20
"""Of an HTML page: its tree needs some ten times as much memory."""


def read_text(stream: Stream) -> tuple[str, int]:
    """(text, bytes). Newlines stay as they are, a byte order mark does not."""
    raw = whole(stream, MAX_ROW_BYTES)
    zero = raw.find(b"\0")
    if zero >= 0:
        raise Unreadable(f"not a text file (NUL byte at offset {zero:,}); remove it or rename it")
    try:
        return raw.decode("utf-8-sig"), len(raw)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text (byte at offset {error.start:,}); convert it to UTF-8") from None


def read_html(stream: Stream, path: str) -> str:
    text = main_text(whole(stream, MAX_PAGE_BYTES), path)
    if not text:
        raise Unreadable("no main text found in this page; remove it")
    return text


def main_text(page: bytes | str, path: str) -> str:
    """What an article says, without menus, footers and comments; "" where there is none (trafilatura,
    Barbaresi 2021, aclanthology.org/2021.acl-demo.15)."""
    trafilatura = from_extra("trafilatura", path)
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it would say on stderr what is said here
    try:
        return trafilatura.extract(page, include_comments=False, deduplicate=False) or ""
    except RecursionError:
        raise Unreadable("its elements are nested too deeply") from None


def read_pdf(file: Any, path: str) -> str:
    """The text of all pages, a line end between two. `file` can seek."""
    pypdf = from_extra("pypdf", path)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("is encrypted; decrypt it first")
        pages, length = [], 0
        for page in reader.pages:
            pages.append(page.extract_text().strip())
            length += len(pages[-1])
            if length > MAX_ROW_BYTES:
                raise Unreadable(f"has more than {MAX_ROW_BYTES:,} characters; divide it")
    except Unreadable:
        raise
    except pypdf.errors.DependencyError:
        raise Unreadable("is encrypted; decrypt it first, or install cryptography") from None
    except OSError:
        raise
    except Exception as error:  # a parser of files from elsewhere, which fails in many ways
        raise Unreadable(f"not a readable PDF ({error or type(error).__name__})") from None
    text = "\n".join(page for page in pages if page)
    if not text:
        raise Unreadable("no text in it (scanned pages need text recognition first)")
    # Fonts without a table of characters give what is no text.
    return text.encode("utf-8", "replace").decode().replace("\0", "")
