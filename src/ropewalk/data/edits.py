"""What the recipe says becomes of places in a document: cut out, replaced by their kind, or not scored.

Places are characters of `Record.plain`: of a conversation, the contents one after the other.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ropewalk.data.records import SEPARATOR, Record

Action = Literal["cut", "replace", "mask"]


class Edit(NamedTuple):
    """Characters start to end; `kind` says what is there: a replaced e-mail address becomes <email>."""

    start: int
    end: int
    action: Action
    kind: str


class Edited(NamedTuple):
    """`unscored`: characters (start, end) of a text, or (number, number + 1) of a conversation's messages.
    `emptied`: nothing is left of a text, or of what the user or the assistant said."""

    record: Record
    unscored: tuple[tuple[int, int], ...] = ()
    emptied: bool = False

    @property
    def scored_is_masked(self) -> bool:
        """Whether something that would be scored is not."""
        messages = self.record.conversation
        return any(messages is None or messages[i]["role"] == "assistant" for i, _ in self.unscored)


def edited(record: Record, edits: Sequence[Edit]) -> Edited:
    """Edits that overlap are one, over all their places: cut if any is, else replaced if any is."""
    if not edits:
        return Edited(record)
    merged = _merged(edits)
    if record.text is not None:
        text, unscored = _apply(record.text, merged)
        return Edited(record.with_contents([text]), unscored, _emptied(record.text, text))
    contents: list[str] = []
    touched: list[tuple[int, int]] = []
    emptied = False
    begin = 0
    for number, message in enumerate(record.conversation or ()):
        if "content" not in message:
            continue
        content = message["content"]
        end = begin + len(content)
        here = [
            edit._replace(start=max(edit.start, begin) - begin, end=min(edit.end, end) - begin)
            for edit in merged
            if edit.start < end and edit.end > begin
        ]
        text, unscored = _apply(content, here)
        contents.append(text)
        emptied |= message["role"] in ("user", "assistant") and _emptied(content, text)
        if unscored:
            touched.append((number, number + 1))
        begin = end + len(SEPARATOR)
    return Edited(record.with_contents(contents), tuple(touched), emptied)


def _emptied(before: str, after: str) -> bool:
    return bool(before.strip()) and not after.strip()


def _merged(edits: Sequence[Edit]) -> list[Edit]:
    rank: Mapping[str, int] = {"cut": 0, "replace": 1, "mask": 2}
    merged: list[Edit] = []
    for edit in sorted(edits):
        if merged and edit.start < merged[-1].end:
            last = merged.pop()
            strongest = min(last, edit, key=lambda e: rank[e.action])
            edit = strongest._replace(start=last.start, end=max(last.end, edit.end))
        merged.append(edit)
    return merged


def _apply(text: str, edits: Sequence[Edit]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """(text, what of it is not scored)."""
    pieces: list[str] = []
    unscored: list[tuple[int, int]] = []
    at = length = 0

    def put(piece: str) -> None:
        nonlocal length
        pieces.append(piece)
        length += len(piece)

    for edit in edits:
        put(text[at : edit.start])
        if edit.action == "mask":
            unscored.append((length, length + edit.end - edit.start))
            put(text[edit.start : edit.end])
        elif edit.action == "replace":
            put(f"<{edit.kind}>")
        at = edit.end
    put(text[at:])
    return "".join(pieces), tuple(unscored)
