"""A document as it was read: plain text, a conversation, or a prompt with its completion."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from ropewalk.errors import UserError

Message = dict[str, Any]
T = TypeVar("T")
ROLES = ("system", "developer", "user", "assistant", "tool")
SEPARATOR = "\n\n"
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Record:
    """`text`, or `messages`, or `prompt` and `completion`. `id` is stable: source, file and line; `where`
    is the file and line for messages to the user.

    `file` is the name below the source (of a member: archive!member), `line` the line or row from 1 (0: the
    file is the document), `start` to `end` its bytes in the decompressed file (-1: that means nothing there).
    """

    id: str
    source: str
    where: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    file: str = ""
    line: int = 0
    start: int = -1
    end: int = -1
    url: str = ""

    @property
    def kind(self) -> str:
        if self.text is not None:
            return "texts"
        return "conversations" if self.messages is not None else "prompts with completions"

    @property
    def contents(self) -> tuple[str, ...]:
        """All that is said in it, in order."""
        if self.text is not None:
            return (self.text,)
        return tuple(message["content"] for message in self.conversation or () if "content" in message)

    def with_contents(self, contents: Sequence[str]) -> "Record":
        """The same with other `contents`, as many as it has."""
        if self.text is not None:
            return replace(self, text=contents[0])
        if self.messages is None:
            return replace(self, prompt=contents[0], completion=contents[1])
        rest = iter(contents)
        messages = [
            {**message, "content": next(rest)} if "content" in message else message
            for message in self.messages
        ]
        return replace(self, messages=tuple(messages))

    @property
    def plain(self) -> str:
        """What cleaning looks at."""
        return SEPARATOR.join(self.contents)

    @property
    def characters(self) -> int:
        return sum(map(len, self.contents))

    @property
    def conversation(self) -> tuple[Message, ...] | None:
        """The messages; a prompt with its completion is a question and the assistant's answer."""
        if self.prompt is not None:
            return (
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.completion},
            )
        return self.messages

    def content_hash(self) -> int:
        """64 bits of the content alone: equal documents have equal hashes, whatever file they come from."""
        content = (
            self.text if self.text is not None else json.dumps(self.conversation, sort_keys=True, default=str)
        )
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def in_batches(
    items: Iterable[T], size: Callable[[T], int], most: int, count: int | None = None
) -> Iterator[list[T]]:
    """The items, some at a time: a batch is full with an item that brings its size to `most`, or with `count`
    items."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most or len(batch) == count:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class Columns(NamedTuple):
    """Names of columns; of text, messages, and prompt with completion, one is set once resolved."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def resolve(self, present: tuple[str, ...], where: str) -> "Columns":
        """The columns to read from a file that has the columns `present`: those named, else those it has.

        Raises UserError that says which columns exist.
        """
        pair = self.prompt or self.completion
        if sum(x is not None for x in (self.text, self.messages, pair)) > 1:
            raise UserError(f"{where}: name one of text, messages, and prompt with completion as its columns")
        if pair:
            wanted = Columns(prompt=self.prompt or "prompt", completion=self.completion or "completion")
        elif self.text or self.messages:
            wanted = self
        elif "messages" in present:
            wanted = Columns(messages="messages")
        elif "prompt" in present and "completion" in present:
            wanted = Columns(prompt="prompt", completion="completion")
        else:
            wanted = Columns(text="text")
        missing = [column for column in wanted if column is not None and column not in present]
        if missing:
            has = ", ".join(present) or "none"
            named = "" if self != Columns() else ", nor messages, nor prompt with completion"
            raise UserError(f"{where}: no column {', '.join(missing)}{named}; its columns are {has}")
        return wanted


def record_from_row(row: Mapping[str, Any], columns: Columns, make: Callable[..., Record]) -> Record:
    """`make` is Record with where it is from. Raises ValueError that says what is wrong with the row."""
    for column in columns:
        if column is not None and column not in row:
            raise ValueError(f"{column} is missing; there is {', '.join(row) or 'nothing'}")
    if columns.messages is not None:
        return make(messages=messages_of(row[columns.messages], columns.messages))
    if columns.text is not None:
        return make(text=_text(row, columns.text))
    assert columns.prompt is not None
    assert columns.completion is not None
    prompt, completion = _text(row, columns.prompt), _text(row, columns.completion)
    if not completion.strip():
        raise ValueError(f"{columns.completion} is empty")
    return make(prompt=prompt, completion=completion)


def messages_of(value: Any, name: str = "messages") -> tuple[Message, ...]:
    """As `check_messages`, of a column that may have them as JSON, since CSV has no lists."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is text, not a list of messages") from None
    return check_messages(value, name)


def check_messages(messages: Any, name: str = "messages") -> tuple[Message, ...]:
    """The messages less keys without a value. Raises ValueError for what is no conversation."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{name} must be a list of {{role, content}}, is {_kind(messages)}")
    if not messages:
        raise ValueError(f"{name} is empty")
    checked = []
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with role and content, is {_kind(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if role not in ROLES:
            lower = role.lower() if isinstance(role, str) else None
            other = lower if lower in ROLES else _OTHER_NAMES.get(lower or "")
            meant = f"; did you mean {other}?" if other else ""
            found = "missing" if role is None else repr(role)
            raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, is {found}{meant}")
        if "content" in message or "tool_calls" not in message:
            content = _text(message, "content", f"{where}.")
            if role in ("user", "assistant") and not content.strip() and "tool_calls" not in message:
                raise ValueError(f"{where}.content ({role}) is empty")
        checked.append(message)
    return tuple(checked)


def _text(row: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = row.get(key)
    if key not in row:
        raise ValueError(f"{prefix}{key} is missing; there is {', '.join(row) or 'nothing'}")
    if not isinstance(value, str):
        raise ValueError(f"{prefix}{key} must be text, is {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{prefix}{key} is not valid Unicode at character {error.start:,}") from None
    if "\0" in value:
        raise ValueError(f"{prefix}{key} has a NUL at character {value.index(chr(0)):,}; it is not text")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
