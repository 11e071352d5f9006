"""Bytes of files, here or behind a URL, decompressed as they are read, within limits."""

import importlib
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from ropewalk.errors import RopewalkError, UserError

MAX_ROW_BYTES = 256 << 20
"""A row, or a document that is a file, that is longer is a BadRow."""
MAX_RATIO, RATIO_FROM = 250, 64 << 20
"""What was compressed may become this many times as much, from this many bytes on. (Text becomes 3 to 10
times as much; deflate reaches 1,032 and zstd 32,000, with files made for it.)"""
CHUNK = 1 << 20


class Unreadable(Exception):  # noqa: N818 - not a failure but the reason in a BadRow
    """Why a file, from here on, cannot be read."""


class Stream(Protocol):
    """As io.RawIOBase.read: up to `size` bytes; none at the end."""

    def read(self, size: int, /) -> bytes: ...


class Stamp(NamedTuple):
    """Another stamp is another content; the same is not proof of the same."""

    size: int
    changed: str


def is_url(path: str) -> bool:
    return "://" in path


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def from_extra(module: str, what: str) -> Any:
    """A module of the extra `data`. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'{what} needs an extra: pip install "ropewalk[data]" ({reason})') from None


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises UserError for a protocol that is unknown or not installed."""
    if "::" in url:
        raise UserError(f"{url}: a URL inside another is not read; give the archive itself")
    fsspec = from_extra("fsspec", url)
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from None
    return system, path


def stamp(path: str) -> Stamp:
    """Size and time of the last change (for a URL what its file system knows). Raises RopewalkError where
    there is no such file any more."""
    try:
        if not is_url(path):
            stat = os.stat(path)
            return Stamp(stat.st_size, str(stat.st_mtime_ns))
        system, inner = filesystem(path)
        system.invalidate_cache()
        return Stamp(system.size(inner) or -1, system.ukey(inner))
    except RopewalkError:
        raise
    except Exception as error:
        raise RopewalkError(f"{path}: {_said(error)}; it was there a moment ago") from None


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file's own bytes, seekable where its place can seek. Raises UserError where it cannot be opened,
    RopewalkError where a file of this machine is another one when the body is done than it was before (that
    also in place of what the body says, since a changing file explains it)."""
    if is_url(path):
        with _remote(path) as remote:
            yield remote
        return
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: {_said(error)}") from None
    with file:
        before = stamp(path)
        try:
            yield file
        except OSError as error:
            _unchanged(path, before)
            raise UserError(f"{path}: {_said(error)}") from None
        except RopewalkError:
            _unchanged(path, before)
            raise
        _unchanged(path, before)


def _unchanged(path: str, before: Stamp) -> None:
    if stamp(path) != before:
        raise RopewalkError(f"{path}: changed while it was read; try again when nobody writes to it")


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def _remote(url: str) -> Iterator[Any]:
    system, path = filesystem(url)
    try:
        # A web server is asked once, for all of it: not all of them can give a part.
        file = system.open(path, "rb", **({"block_size": 0} if is_web(url) else {}))
    except Exception as error:  # each file system has its own kinds
        raise UserError(f"{url}: cannot be opened ({_said(error)})") from None
    with file:
        yield _Remote(file, url)


class _Remote(io.RawIOBase):
    """A file of fsspec, whose failures, of many types, are all told as one."""

    def __init__(self, file: Any, url: str) -> None:
        self.file, self.url = file, url

    def _try(self, what: Callable[..., Any], *values: int) -> Any:
        try:
            return what(*values)
        except Exception as error:
            raise RopewalkError(f"{self.url}: cannot be read on ({_said(error)})") from None

    def readinto(self, buffer: Any, /) -> int:
        data = self._try(self.file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._try(self.file.seek, offset, whence)

    def tell(self) -> int:
        return self._try(self.file.tell)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not is_web(self.url) and bool(self.file.seekable())  # a stream claims that it could


def inflated(raw: Stream, path: str, compression: str | None) -> Stream:
    """What a gzip (RFC 1952) or zstd (RFC 8878) file holds, members or frames one after the other."""
    if compression is None:
        return raw
    if compression == "gzip":
        return _Inflated(raw, path, lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), zlib.error)
    zstandard = from_extra("zstandard", path)
    # Dumps made with --long=31 are common; the window is only touched as far as there is content.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _Inflated(raw, path, decompressor.decompressobj, zstandard.ZstdError)


class _Inflated:
    """Gives all that comes before damage; then raises Unreadable. Raises UserError for a bomb.

    Takes 4 kB at a time: at most 4 MB of deflate, 130 MB of zstd (its decoder takes no limit).
    """

    def __init__(self, raw: Stream, path: str, new: Callable[[], Any], damage: type[Exception]) -> None:
        self.raw, self.path, self.new, self.damage = raw, path, new, damage
        self.decoder: Any = None
        self.waiting = self.ready = b""
        self.taken = self.given = 0
        self.failure: Unreadable | None = None

    def read(self, size: int = CHUNK, /) -> bytes:
        parts, length = [self.ready], len(self.ready)
        while length < size and self.failure is None:
            try:
                data = self._more()
            except Unreadable as failure:
                self.failure = failure
                break
            if data is None:
                break
            parts.append(data)
            length += len(data)
        if self.failure is not None and not length:
            raise self.failure
        data = b"".join(parts)
        self.ready = data[size:]
        return data[:size]

    def _more(self) -> bytes | None:
        if not self.waiting:
            self.waiting = self.raw.read(4096)
            self.taken += len(self.waiting)
            if not self.waiting and self.decoder is None:
                return None
        if self.decoder is None:
            self.waiting = self.waiting.lstrip(b"\0")  # padding after a member
            if not self.waiting:
                return b""
            self.decoder = self.new()
        if not self.waiting:
            raise Unreadable(f"ends in the middle (after {self.taken:,} bytes of the compressed file)")
        try:
            data = self.decoder.decompress(self.waiting)
        except self.damage as error:
            at = self.taken - len(self.waiting)
            raise Unreadable(f"is damaged after byte {at:,} of the compressed file ({error})") from None
        self.waiting = b""
        if self.decoder.eof:
            self.waiting, self.decoder = self.decoder.unused_data, None
        self.given += len(data)
        refuse_bomb(self.path, self.given, self.taken)
        return data


def refuse_bomb(path: str, given: int, taken: int) -> None:
    """Raises UserError where `taken` compressed bytes became too many."""
    if given > RATIO_FROM and given > MAX_RATIO * taken:
        raise UserError(
            f"{path}: {taken:,} compressed bytes became {given:,}, more than {MAX_RATIO} times as "
            f"many, which no text does; decompress it yourself if it is what you want"
        )


def chunks(stream: Stream) -> Iterator[bytes]:
    read = getattr(stream, "read1", stream.read)  # what is there, so that nothing is lost before damage
    while chunk := read(CHUNK):
        yield chunk


def whole(stream: Stream, limit: int) -> bytes:
    """All of a stream. Raises Unreadable for more than `limit` bytes, of which few more are read."""
    parts, length = [], 0
    for chunk in chunks(stream):
        parts.append(chunk)
        length += len(chunk)
        if length > limit:
            raise Unreadable(f"is longer than {limit:,} bytes; divide it into several documents")
    return b"".join(parts)


@contextmanager
def seekable(stream: Any) -> Iterator[Any]:
    """The stream, or a temporary file with what is in it."""
    if getattr(stream, "seekable", bool)():
        yield stream
        return
    with tempfile.TemporaryFile() as file:
        for chunk in chunks(stream):
            file.write(chunk)
        file.seek(0)
        yield file


def lines(
    stream: Stream, at: int = 0, end: int | None = None, *, limit: int
) -> Iterator[tuple[int, int, bytes | None]]:
    """(first byte, byte after the last, the bytes) of the lines that begin before byte `end`, without the
    \\n that ends them; None for a line of more than `limit` bytes, of which none are held.

    The stream's next byte is byte `at` of the file.
    """
    held: list[bytes] = []
    length = 0
    for chunk in chunks(stream):
        parts = chunk.split(b"\n")
        for i, part in enumerate(parts):
            if i:
                yield at, at + length, None if length > limit else b"".join(held)
                at += length + 1
                if end is not None and at >= end:
                    return
                held.clear()
                length = 0
            length += len(part)
            held.append(part)
            if length > limit:
                held.clear()
    if length:
        yield at, at + length, None if length > limit else b"".join(held)
