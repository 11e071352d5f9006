"""One preparation: reads, tokenizes in threads, and writes token shards in the order of the input."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.data.readers import InputFile, Source, read_source
from ropewalk.data.records import BadRow, Record
from ropewalk.data.report import Tally
from ropewalk.data.shards import ShardWriter
from ropewalk.data.tokenize import Score, Tokenization, Tokens, split
from ropewalk.errors import UserError

BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 20


@dataclass(frozen=True)
class Options:
    """The parts of a recipe that decide what the shards hold (see recipe.schema.Data)."""

    sequence_length: int
    validation_fraction: float = 0.0
    seed: int = 0
    too_long: str = "auto"
    score: Score = "auto"
    append_eos: bool = True
    max_bad_rows: int = 0


class Encoded(NamedTuple):
    """A record with its tokens; None for an empty text."""

    record: Record
    tokens: Tokens | None
    content_hash: int


class Build:
    """Writes `train` and `validation` below `folder`; `input_bytes` is only for the progress that is said."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        options: Options,
        workers: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        input_bytes: int = 0,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.tokenization = Tokenization(tokenizer, score=options.score, append_eos=options.append_eos)
        if options.sequence_length < 3 + len(self.tokenization.begin):
            raise UserError(f"data.sequence_length: {options.sequence_length} is too short for any document")
        self.folder = folder
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.writers: dict[str, ShardWriter] = {}
        self.tally = Tally()
        self.workers = workers or cpu_count() or 1
        self.progress = progress
        self.input_bytes, self._done = input_bytes, 0

    def note(self, text: str) -> None:
        self.tally.notes.append(text)

    def add(self, source: Source, files: list[InputFile], held_out: bool) -> None:
        """All documents of a source. Raises UserError for a source that has none."""
        before = self.tally.kinds.total()
        for item in self._encoded(read_source(source, files)):
            if isinstance(item, BadRow):
                self._skip(item)
                continue
            self._count(item.record)
            if item.tokens is None:
                self.tally.change("left out: empty", item.record.where)
                continue
            share = self.options.validation_fraction
            held = held_out or _held_out(item.content_hash, self.options.seed, share)
            self._write(item.record, item.tokens, item.content_hash, "validation" if held else "train")
        if self.tally.kinds.total() == before:
            raise UserError(f"{source.path}: no documents in it (data source {source.name})")

    def finish(self) -> dict[str, Any]:
        """Closes the shards; the report. Raises UserError where nothing is left to train on."""
        options, held_out = self.options, len(self.tally.validation.lengths)
        if not self.tally.train.lengths:
            why = [f"{count:,} {what}" for what, count in self.tally.changes.items()]
            if held_out and options.validation_fraction:
                held = f"{held_out:,} held out by data.validation_fraction={options.validation_fraction:g}"
                why.append(f"{held} (lower it, or name data.validation)")
            raise UserError(f"no documents are left to train on: {', '.join(why) or 'there were none'}")
        for writer in self.writers.values():
            writer.close()
        if self.tally.kinds["prompts with completions"]:
            chat = self.tokenization.has_template
            how = "rendered as user and assistant turns" if chat else "put together without a chat template"
            self.note(f"prompts with completions are {how}")
        if options.validation_fraction and not held_out:
            self.note(f"data.validation_fraction={options.validation_fraction:g} of so few documents is none")
        return self.tally.report(self.tokenizer, options.sequence_length)

    def _encoded(self, items: Iterator[Record | BadRow]) -> Iterator[Encoded | BadRow]:
        """In the order of the items, a few batches ahead of what is asked for."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ropewalk-tokenize")
        pending: deque[Future[list[Encoded | BadRow]]] = deque()
        try:
            for batch in _batches(items):
                pending.append(pool.submit(self._encode, batch))
                if len(pending) > self.workers + 1:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, batch: list[Record | BadRow]) -> list[Encoded | BadRow]:
        records = [item for item in batch if isinstance(item, Record) and not _empty(item)]
        tokens = iter(self.tokenization(records))
        encoded: list[Encoded | BadRow] = []
        for item in batch:
            if isinstance(item, BadRow):
                encoded.append(item)
                continue
            found = None if _empty(item) else next(tokens)
            bad = isinstance(found, BadRow)
            encoded.append(found if bad else Encoded(item, found, item.content_hash()))  # type: ignore[arg-type]
        return encoded

    def _write(self, record: Record, tokens: Tokens, content_hash: int, name: str) -> None:
        pieces = self._fit(record, tokens)
        if not pieces:
            return
        kept = [piece for piece in pieces if piece.scored.any()]
        if not kept:
            self._skip(BadRow(record.where, self._unscored(record, tokens)))
            return
        tally = self.tally.train if name == "train" else self.tally.validation
        for i, piece in enumerate(pieces):
            id = record.id if len(pieces) == 1 else f"{record.id}#{i}"
            if not piece.scored.any():
                self.tally.change("left out: a piece without scored tokens", f"{record.where} (piece {i})")
                continue
            if name not in self.writers:
                self.writers[name] = ShardWriter(self.folder / name, self.vocab_size)
            self.writers[name].add(piece.ids, piece.scored, id, record.source)
            tally.add(record.source, piece)
        tally.hashes.append(content_hash)
        self.tally.turns_without_end += tokens.turns_without_end
        if name == "train":
            self.tally.sample(content_hash, record, kept[0])

    def _fit(self, record: Record, tokens: Tokens) -> list[Tokens]:
        """The document in pieces that fit in a row, as data.too_long says."""
        limit, count, policy = self.options.sequence_length, len(tokens.ids), self.options.too_long
        if count <= limit or policy == "keep":
            return [tokens]
        if policy == "auto":
            policy = "split" if record.text is not None else "error"
        if policy == "split":
            self.tally.change("split", record.where)
            return split(tokens, limit, self.tokenization.begin if record.text is not None else ())
        if policy == "truncate":
            self.tally.change("truncated", record.where)
            self.tally.truncated_tokens += count - limit
            return [Tokens(tokens.ids[:limit], tokens.scored[:limit])]
        if policy == "drop":
            self.tally.change("left out: too long", record.where)
            return []
        raise UserError(
            f"{record.where}: {count:,} tokens, and rows are {limit:,} long; set data.sequence_length="
            f"{count} or more, or data.too_long to truncate, split or drop"
        )

    def _unscored(self, record: Record, tokens: Tokens) -> str:
        if tokens.scored.any():
            limit = self.options.sequence_length
            return f"none of its first {limit:,} tokens is scored; raise data.sequence_length"
        if all(message["role"] != "assistant" for message in record.conversation or ()):
            return "no token is scored: it has " + (
                "no message of the assistant" if record.messages is not None else "only one token"
            )
        return "no token is scored"

    def _skip(self, row: BadRow) -> None:
        """Notes a bad row. Raises UserError for one more than the recipe lets pass."""
        allowed = self.options.max_bad_rows
        if len(self.tally.skipped) >= allowed:
            limit = f"data.max_bad_rows is {allowed:,}"
            raise UserError(f"{row}; {limit if allowed else 'set data.max_bad_rows to skip such rows'}")
        self.tally.skipped.append(row)

    def _count(self, record: Record) -> None:
        self.tally.read(record)
        self._done += _characters(record)
        if self.progress is not None and self.tally.kinds.total() % BATCH_ROWS == 0:
            # Characters against bytes: near enough for a line that moves.
            self.progress("MB", min(self._done, self.input_bytes) >> 20, self.input_bytes >> 20)


def _empty(record: Record) -> bool:
    return record.text is not None and not record.text.strip()


def _characters(record: Record) -> int:
    if record.text is not None:
        return len(record.text)
    return sum(len(message.get("content", "")) for message in record.conversation or ())


def _batches(items: Iterator[Record | BadRow]) -> Iterator[list[Record | BadRow]]:
    batch: list[Record | BadRow] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += _characters(item) if isinstance(item, Record) else 0
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _held_out(content_hash: int, seed: int, share: float) -> bool:
    """By content and seed alone: equal documents go to the same side, whatever else is in the data."""
    digest = hashlib.blake2b(f"{seed}:{content_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
