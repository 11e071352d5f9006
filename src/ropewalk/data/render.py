"""Conversations to text with the assistant's parts found exactly, for any chat template.

What counts as the assistant's is what the model would have to generate: everything after the generation
prompt, through the token that ends the turn. Templates with {% generation %} markers say it themselves.
For the others the template is asked again with stand-ins for the contents:

1. Once for each *shape* (sequence of roles), with a stand-in for every content: that shows the text
   between the contents. A conversation whose rendering is those pieces with its own contents (or its
   contents stripped) between them, in exactly one way, is understood.
2. For any other (thinking that is removed from earlier turns, extra keys): a stand-in for one turn at a
   time, everything else in place, shows what follows that turn; rendering what comes before it as a
   prompt shows where it begins. Both must be found in the conversation's own rendering.

Where neither holds nothing is guessed: `RenderError` is raised.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ropewalk.data.records import Message
from ropewalk.errors import UserError


class RenderError(ValueError):
    """A conversation that the template refuses, or whose assistant tokens cannot be told exactly."""


class Span(NamedTuple):
    """Characters `[start, end)` of a rendered conversation are scored; the content ends at `content_end`,
    and what is left is the token that ends the turn (nothing where the template has none)."""

    start: int
    content_end: int
    end: int


_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LOCK = threading.Lock()  # transformers keeps track of markers in the compiled template, which threads share


class ChatTemplate:
    """A tokenizer's chat template, rendered by transformers in its sandbox.

    Raises UserError where there is none, or it is not Jinja.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError:
            raise UserError("the tokenizer has no chat template; name one in data.chat_template") from None
        self.marked = _MARKER.search(self.template) is not None
        self._variables: Mapping[str, Any] = tokenizer.special_tokens_map
        added = (str(token) for token in tokenizer.added_tokens_encoder)
        ends = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._end_of_turn = re.compile(r"\s*(?:" + "|".join(map(re.escape, ends)) + ")") if ends else None
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation. Raises RenderError with the template's message where that refuses it."""
        return self._call(messages)[0]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation with the generation prompt at its end. Raises as `text` does."""
        return self._call(messages, add_generation_prompt=True)[0]

    def rendered(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation, and where the assistant's turns are in it, in order. Raises RenderError."""
        if self.marked:
            text, marks = self._call(messages, return_assistant_tokens_mask=True)
            return text, [Span(start, end, end) for start, end in marks if start < end]
        text = self.text(messages)
        if not any(message["role"] == "assistant" for message in messages):
            return text, []
        spans = None
        if all(message.keys() == {"role", "content"} for message in messages):
            spans = self._spans_by_shape(messages, text)
        return text, self._spans_by_turn(messages, text) if spans is None else spans

    def _call(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _LOCK:
                result: Any = render_jinja_template(
                    conversations=[list(messages)], chat_template=self.template, **options, **self._variables
                )
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message})"
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise RenderError(f"the chat template refuses this conversation: {error}") from None
        texts, marks = result
        return texts[0], marks[0] if marks else []

    # 1. By shape

    def _spans_by_shape(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._shapes:
            try:
                self._shapes[roles] = self._shape(roles)
            except RenderError:  # by turn the reason is found again, about the conversation itself
                self._shapes[roles] = None
        shape = self._shapes[roles]
        contents = shape and shape.find([message["content"] for message in messages], text)
        if not shape or not contents:
            return None
        spans = []
        for (start, end), lead, tail in zip(contents, shape.leads, shape.tails, strict=True):
            if lead is not None:
                spans.append(Span(start - lead, end, end + tail))
        return spans

    def _shape(self, roles: tuple[str, ...]) -> "_Shape | None":
        messages: list[Message] = [{"role": role, "content": _stand_in(i)} for i, role in enumerate(roles)]
        text, between, starts = self.text(messages), [], []
        at = 0
        for message in messages:
            if text.count(message["content"]) != 1 or (start := text.find(message["content"], at)) < 0:
                return None
            between.append(text[at:start])
            starts.append(start)
            at = start + len(message["content"])
        between.append(text[at:])
        leads = [
            len(self._lead(messages, i, text[:start])) if role == "assistant" else None
            for i, (role, start) in enumerate(zip(roles, starts, strict=True))
        ]
        tails = [
            len(self._tail(messages, i, between[i + 1])) if role == "assistant" else 0
            for i, role in enumerate(roles)
        ]
        return _Shape(between, leads, tails)

    # 2. By turn

    def _spans_by_turn(self, messages: Sequence[Message], text: str) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if "tool_calls" in message or "content" not in message:
                raise RenderError(_unclear(i, "it calls a tool"))
            stood_in = [*messages]
            stood_in[i] = {**message, "content": _stand_in(i)}
            before, found, after = self.text(stood_in).partition(_stand_in(i))
            lead = len(self._lead(messages, i, before)) if found else 0
            start, content_end = len(before) - lead, len(text) - len(after)
            if not found or not text.endswith(after) or text[:start] != before[:start] or content_end < start:
                raise RenderError(_unclear(i, "its content changes the text around it"))
            spans.append(Span(start, content_end, content_end + len(self._tail(stood_in, i, after))))
        return spans

    def _lead(self, messages: Sequence[Message], i: int, before: str) -> str:
        """What the assistant generates before the content of turn `i`, which `before` stands before."""
        if i == 0:
            raise RenderError("the conversation begins with the assistant: there is no prompt to answer")
        prompt = self.prompt(messages[:i])
        if not before.startswith(prompt):
            raise RenderError(_unclear(i, "the prompt for it is not how the conversation begins"))
        lead = before[len(prompt) :]
        if lead.strip() and prompt == self.text(messages[:i]):
            raise RenderError(
                "the chat template ignores add_generation_prompt, so nothing asks the model to answer; "
                "name one that adds the assistant's header in data.chat_template"
            )
        return lead

    def _tail(self, messages: Sequence[Message], i: int, after: str) -> str:
        """The token that ends turn `i` with the white space before it: the assistant's own last token, not
        one that only opens the next turn. Empty where there is none."""
        own = self.text(messages[: i + 1]).rpartition(messages[i]["content"])[2]
        match = self._end_of_turn.match(own) if self._end_of_turn else None
        return match[0] if match and after.startswith(match[0]) else ""


class _Shape(NamedTuple):
    """The text between the contents of conversations with the same roles: one piece more than contents.

    `leads[i]` is how many characters before content `i` the assistant generates too (None for other
    roles), `tails[i]` how many after it.
    """

    between: list[str]
    leads: list[int | None]
    tails: list[int]

    def find(self, contents: Sequence[str], text: str) -> list[tuple[int, int]] | None:
        """Where each content is in `text`; None unless text is those contents and pieces in just one way."""
        if not text.startswith(self.between[0]):
            return None
        ways: dict[int, list[tuple[int, int]]] = {len(self.between[0]): []}
        for content, after in zip(contents, self.between[1:], strict=True):
            further: dict[int, list[tuple[int, int]]] = {}
            for at, spans in ways.items():
                for variant in {
                    content,
                    content.strip(),
                    content.lstrip(),
                    content.rstrip(),
                    content.strip("\n"),
                }:
                    end = at + len(variant)
                    if text.startswith(variant, at) and text.startswith(after, end):
                        if end + len(after) in further:
                            return None
                        further[end + len(after)] = [*spans, (at, end)]
            ways = further
        return ways.get(len(text))


def _stand_in(i: int) -> str:
    """No white space, no markup, and none is a part of another."""
    return f"Zq{i}qZ"


def _unclear(i: int, why: str) -> str:
    return (
        f"which tokens of messages[{i}] are the assistant's cannot be told exactly with this chat template "
        f"({why}); name one with {{% generation %}} markers in data.chat_template"
    )
