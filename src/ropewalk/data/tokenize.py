"""Records to tokens with the scored ones marked. Deterministic, and usable from several threads at once."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ropewalk.data.records import BadRow, Message, Record, check_messages
from ropewalk.data.render import ChatTemplate, RenderError, Span
from ropewalk.errors import UserError

Score = Literal["auto", "all", "assistant"]
Places = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids [n] uint32 and scored [n] bool. The first token is never scored: nothing predicts it.

    `turns_without_end` counts scored turns that no token ends.
    """

    ids: np.ndarray
    scored: np.ndarray
    turns_without_end: int = 0


class Tokenization:
    """How records become tokens with one tokenizer.

    Plain text is begun as the tokenizer begins a text (its BOS, where it has one) and ended with EOS; a
    conversation is what the chat template renders, and nothing else; a prompt with its completion is a
    conversation where there is a chat template, else the two put together with the completion scored.
    `score`: "all" tokens, or those of the "assistant"; "auto" is all for text, else the assistant's.
    Raises UserError for a tokenizer that cannot be used so.
    """

    def __init__(self, tokenizer: Any, *, score: Score = "auto", append_eos: bool = True) -> None:
        from tokenizers import Tokenizer, processors

        self._made_from = tokenizer, append_eos
        # A copy, since a tokenizer file may ask for truncation, and offsets must cover white space too.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        plain, special = self._ids("a"), self._backend.encode("a").ids
        begins = [k for k in range(len(special)) if special[k : k + len(plain)] == plain]
        self.begin: list[int] = special[: begins[0]] if begins else []
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)
        # A tokenizer that puts a space before every text (SentencePiece) cannot encode the pieces of one.
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self._headers: dict[str, list[int]] = {}
        self._cuttable = self._ids("\na") == self._ids("\n") + self._ids("a")
        eos = tokenizer.eos_token_id
        if append_eos and eos is None:
            raise UserError("the tokenizer has no end-of-sequence token; set data.append_eos=false")
        self.end: list[int] = [eos] if append_eos else []
        self.score = score
        self.has_template = bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer) if self.has_template else None

    def __reduce__(self) -> Any:
        """For other processes: as what it is made from, since a template does not travel."""
        tokenizer, append_eos = self._made_from
        return partial(Tokenization, score=self.score, append_eos=append_eos), (tokenizer,)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def __call__(
        self, records: Sequence[Record], unscored: Sequence[Places] | None = None
    ) -> list[Tokens | BadRow]:
        """In the order of the records; a row that cannot be rendered exactly becomes a BadRow.

        `unscored`: for each record what is not scored in any case, characters (start, end) of a text, numbers
        (first, last + 1) of a conversation's messages. The encoding itself is done by the tokenizer's own
        threads, without the interpreter lock.
        """
        apart = unscored or [()] * len(records)
        results: list[Tokens | BadRow | None] = [None] * len(records)
        texts: list[int] = []
        marked: list[tuple[int, str, list[Span]]] = []
        for i, record in enumerate(records):
            try:
                if record.text is not None:
                    if self.score == "assistant":
                        raise RenderError("is plain text, in which data.score=assistant scores nothing")
                    texts.append(i)
                else:
                    marked.append((i, *self._rendered(record, apart[i])))
            except RenderError as error:
                results[i] = BadRow(record.where, str(error))
        encode, options = self._backend.encode_batch_fast, {"add_special_tokens": False}
        for i, encoding in zip(texts, encode([records[i].text for i in texts], **options), strict=True):
            scored = None
            if apart[i]:  # again, since the fast way leaves out where tokens are
                offsets = self._backend.encode(records[i].text, **options).offsets
                scored = np.array([_outside(places, apart[i]) for places in offsets], bool)
            results[i] = self._finish(_array(encoding.ids), scored, begin=True, end=True)
        encodings = self._backend.encode_batch([text for _, text, _ in marked], **options)
        for (i, text, spans), encoding in zip(marked, encodings, strict=True):
            try:
                results[i] = self._marked(text, spans, encoding, plain=not self._as_chat(records[i]))
            except RenderError as error:
                results[i] = BadRow(records[i].where, str(error))
        return [result for result in results if result is not None]

    def _as_chat(self, record: Record) -> bool:
        return record.messages is not None or self.has_template

    def _rendered(self, record: Record, unscored: Places = ()) -> tuple[str, list[Span]]:
        if self._as_chat(record):
            if self._template is None:
                raise UserError(
                    f"{record.where}: is a conversation, and the tokenizer has no chat template; "
                    "name one in data.chat_template"
                )
            messages = record.conversation or ()
            if self.score == "all":
                return self._template.text(messages), []
            text, spans = self._template.rendered(messages)
            if unscored:
                answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
                if len(answers) != len(spans):
                    raise RenderError("which of the assistant's turns are scored cannot be told apart")
                spans = [span for i, span in zip(answers, spans, strict=True) if (i, i + 1) not in unscored]
            return text, spans
        prompt, completion = record.prompt or "", record.completion or ""
        end = len(prompt) + len(completion)
        if (1, 2) in unscored:
            return prompt + completion, []
        return prompt + completion, [Span(len(prompt), end, end)] if self.score != "all" else []

    def _marked(self, text: str, spans: list[Span], encoding: Any, plain: bool) -> Tokens:
        ids = _array(encoding.ids)
        mask = np.zeros(len(ids), dtype=bool)
        for span in spans:
            edges = _edges(encoding, span, len(text))
            if edges is None or not self._begins_alike(text[: span.start], encoding, edges[0]):
                ids, mask = self._cut(text, spans)
                break
            mask[slice(*edges)] = True
        open_ended = 0 if plain else sum(span.end == span.content_end for span in spans)
        finished = self._finish(ids, None if self.score == "all" else mask, begin=plain, end=plain)
        return Tokens(finished.ids, finished.scored, open_ended)

    def _begins_alike(self, prompt: str, encoding: Any, first: int) -> bool:
        """Whether the tokens before the `first` scored one are those of the prompt alone.

        They may differ even where none lies across: many a pre-tokenizer looks ahead from white space to
        what follows. Control tokens cut a text, so that only what is after the last one needs to be seen.
        """
        if not self._cuttable:
            return True  # such tokenizers do not look ahead, and could not be asked
        ids, last = encoding.ids, first - 1
        while last >= 0 and ids[last] not in self._added:
            last -= 1
        header = prompt[encoding.token_to_chars(last)[1] :] if last >= 0 else prompt
        alone = self._headers.get(header)
        if alone is None:
            alone = self._ids(header)
            if len(self._headers) < 1000:  # templates have a few; without control tokens each is another
                self._headers[header] = alone
        return alone == ids[last + 1 : first]

    def _cut(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the scored and the other parts of a text apart: so the prompt's tokens are those that
        the model is given when it has to answer."""
        if not self._cuttable:
            raise RenderError(
                "a token lies both in the prompt and in the answer; "
                "move the white space at the prompt's end to the answer's start"
            )
        edges = [0, *(edge for span in spans for edge in (span.start, span.end)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(edges)]
        parts = [e.ids for e in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]
        scored = np.arange(len(parts)) % 2 == 1
        return np.concatenate([np.array(part, dtype=np.uint32) for part in parts]), np.repeat(
            scored, [len(part) for part in parts]
        )

    def _finish(self, ids: np.ndarray, scored: np.ndarray | None, begin: bool, end: bool) -> Tokens:
        """Adds BOS and EOS where they are wanted and not there yet; EOS is scored."""
        if scored is None:
            scored = np.ones(len(ids), dtype=bool)
        if begin and self.begin and ids[: len(self.begin)].tolist() != self.begin:
            ids = np.concatenate([np.array(self.begin, dtype=np.uint32), ids])
            scored = np.concatenate([np.zeros(len(self.begin), dtype=bool), scored])
        if end and self.end and ids[-1:].tolist() != self.end:
            ids = np.concatenate([ids, np.array(self.end, dtype=np.uint32)])
            scored = np.concatenate([scored, [True]])
        scored[:1] = False
        return Tokens(ids, scored)


def _edges(encoding: Any, span: Span, length: int) -> tuple[int, int] | None:
    """(first token of a span, first token after it); None where a token lies across its edge."""
    first, last = _token_at(encoding, span.start, length), _token_at(encoding, span.end, length)
    if first < len(encoding) and encoding.token_to_chars(first)[0] < span.start:
        return None
    if last < len(encoding) and (begin := encoding.token_to_chars(last)[0]) < span.end:
        if span.content_end == span.end or begin < span.content_end:
            return None
        last += 1  # the end-of-turn token takes the white space after it along
    return first, last


def _outside(token: tuple[int, int], places: Places) -> bool:
    """Whether no part of a token, characters (start, end), lies in one of the places."""
    return not any(token[0] < end and token[1] > start for start, end in places)


def _array(ids: list[int]) -> np.ndarray:
    """[n] uint32; three times as fast as numpy takes a list."""
    return np.frombuffer(array("I", ids), dtype=np.uint32)


def _token_at(encoding: Any, character: int, length: int) -> int:
    """The first token that covers `character` or, where none does, the next that is covered."""
    while character < length:
        token = encoding.char_to_token(character)
        if token is not None:
            return token
        character += 1
    return len(encoding)


def render(
    messages: Sequence[Message], tokenizer: Any, score: Score = "assistant"
) -> tuple[list[int], list[bool]]:
    """(token ids, which are scored) of a conversation: the assistant's, each turn with what ends it.

    The ids are those of the tokenizer's chat template. Raises UserError where that is refused or cannot be
    done exactly. For many conversations make one `Tokenization`.
    """
    try:
        record = Record("", "", "the conversation", messages=check_messages(messages))
    except ValueError as error:
        raise UserError(str(error)) from None
    result = Tokenization(tokenizer, score=score, append_eos=False)([record])[0]
    if isinstance(result, BadRow):
        raise UserError(str(result))
    return result.ids.tolist(), result.scored.tolist()


def render_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids that ask the model for the next turn of a conversation.

    Raises UserError for a tokenizer without chat template, and with the message of one that refuses.
    """
    try:
        text = ChatTemplate(tokenizer).prompt(check_messages(messages))
    except ValueError as error:
        raise UserError(str(error)) from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def split(tokens: Tokens, limit: int, begin: Sequence[int] = ()) -> list[Tokens]:
    """Pieces of 2 to `limit` (at least 3) tokens; each begins with `begin`, where the whole does."""
    head = len(begin) if tokens.ids[: len(begin)].tolist() == list(begin) else 0
    size, total = limit - head, len(tokens.ids) - head
    edges = [*range(0, total, size), total]
    if edges[-1] - edges[-2] + head < 2:
        edges[-2] -= 1
    pieces = []
    for a, b in pairwise(edges):
        ids, scored = tokens.ids[head + a : head + b], tokens.scored[head + a : head + b].copy()
        if head:
            ids, scored = (
                np.concatenate([tokens.ids[:head], ids]),
                np.concatenate([tokens.scored[:head], scored]),
            )
        scored[:1] = False
        pieces.append(Tokens(ids, scored))
    return pieces
