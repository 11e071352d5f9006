"""A JSON array of objects, read one element at a time; or a file of JSON lines that is called .json."""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain

from ropewalk.data.readers.rows import BOM, DECODER, Row, Rows, object_or_reason, read_jsonl, said
from ropewalk.data.readers.streams import MAX_ROW_BYTES, Stream, chunks
from ropewalk.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR = 32
"""A mistake this near to the end of what has been read may be a number or an escape that is not all there."""


def read_json(stream: Stream, path: str) -> Rows:
    """Numbered by the line that an element starts on. Raises UserError for an array that is not one."""
    parts = chunks(stream)
    head = b""
    for chunk in parts:
        head += chunk
        if len(head) > len(BOM) and head.removeprefix(BOM).strip():
            break
    parts = chain([head], parts)
    if head.removeprefix(BOM).lstrip()[:1] == b"[":
        yield from _Array(parts, path).rows()
    else:
        yield from read_jsonl(_Chunks(parts))


class _Chunks:
    """Chunks as a stream."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts

    def read(self, size: int = -1, /) -> bytes:
        return next(self.parts, b"")


class _Array:
    """`text[at:]` has been read and not been looked at; `line` and `byte` are those of text[at]."""

    def __init__(self, parts: Iterator[bytes], path: str) -> None:
        self.parts, self.path = parts, path
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.line, self.byte, self.ended = "", 0, 1, 0, False

    def rows(self) -> Rows:
        self._more()
        if self.text.startswith("\ufeff"):
            self._go(1)
        self._space()
        self._go(self.at + 1)  # [
        self._space()
        while self.text[self.at : self.at + 1] != "]":
            value, end = self._element()
            line, start = self.line, self.byte
            self._go(end)
            yield Row(line, object_or_reason(value), start, self.byte)
            self._space()
            if self.text[self.at : self.at + 1] == ",":
                self._go(self.at + 1)
                self._space()
            elif self.text[self.at : self.at + 1] != "]":
                self._wrong("a comma or the end of the array is missing")
        self._go(self.at + 1)
        self._space()
        if self.at < len(self.text):
            self._wrong("something follows the end of the array")

    def _element(self) -> tuple[object, int]:
        """Reads on, twice as much each time, until the element is whole: the cost is that of its length."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                self._wrong(said(error))
            except ValueError as error:
                place = getattr(error, "pos", self.at)
                open_ = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or place + _NEAR > len(self.text)
                )
                if not open_ or self.ended:
                    self.line += self.text.count("\n", self.at, place)
                    self._wrong(said(error))
            else:
                if self.ended or end + _NEAR < len(self.text):
                    return value, end
                if not isinstance(value, int | float):
                    return value, end
            if len(self.text) - self.at > MAX_ROW_BYTES:
                self._wrong(f"an element is longer than {MAX_ROW_BYTES:,} characters")
            self._more(max(1, len(self.text) - self.at))

    def _space(self) -> None:
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._go(match.end())
            if self.at < len(self.text) or self.ended:
                return
            self._more()

    def _go(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.line += passed.count("\n")
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.at = to

    def _more(self, characters: int = 1) -> None:
        """Drops what has been looked at and reads at least so many characters more, where there are any."""
        new, length = [self.text[self.at :]], 0
        while length < characters and not self.ended:
            raw = next(self.parts, b"")
            self.ended = not raw
            try:
                new.append(self.decode(raw, final=not raw))
            except UnicodeDecodeError as error:
                before = "".join(new) + error.object[: error.start].decode()
                self.line += before.count("\n")
                place = self.byte + len(before.encode())
                raise UserError(
                    f"{self.path}:{self.line}: not UTF-8 (byte {place:,}); convert the file to UTF-8"
                ) from None
            length += len(new[-1])
        self.text, self.at = "".join(new), 0

    def _wrong(self, reason: str) -> None:
        raise UserError(f"{self.path}:{self.line}: not valid JSON ({reason})")
