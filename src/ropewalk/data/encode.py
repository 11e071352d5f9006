"""The kept documents of one unit as tokens, in pieces that fit in a row: one file, and an account of it."""

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.data.documents import Documents, too_many
from ropewalk.data.edits import Edited, edited
from ropewalk.data.part_files import PART, open_part, reading
from ropewalk.data.records import BadRow, Record, in_batches
from ropewalk.data.tokenize import Score, Tokenization, Tokens, split
from ropewalk.data.verdicts import Verdicts
from ropewalk.errors import UserError

BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 20
GROUP_TOKENS = 1 << 20
NAMED = 1000
"""Rows named for each reason; the count is always of all."""
_SCHEMA = pa.schema(
    {
        "row": pa.int32(),
        "piece": pa.int32(),
        "pieces": pa.int32(),
        "ids": pa.large_binary(),
        "scored": pa.large_binary(),
    }
)
"""ids: 4 bytes a token, scored: one; lists would have a length and a level for each token to encode."""
_WRITTEN: dict[str, Any] = {**PART, "compression": "lz4", "use_dictionary": False, "write_statistics": False}
LAYOUT = 2
"""Counted up when the files are laid out in another way."""


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


@dataclass
class Account:
    """What became of the documents of a unit, JSON-able."""

    kinds: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    changed: dict[str, list[str]] = field(default_factory=dict)
    """what was done -> the first ids of the records it was done to"""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason)"""
    truncated_tokens: int = 0
    turns_without_end: int = 0

    def change(self, what: str, where: str) -> None:
        self.changes[what] += 1
        if self.changes[what] <= NAMED:
            self.changed.setdefault(what, []).append(where)

    def add(self, other: "Account") -> None:
        """What became of another unit, but for its bad rows, of which there is a limit."""
        self.kinds.update(other.kinds)
        self.changes.update(other.changes)
        for what, where in other.changed.items():
            named = self.changed.setdefault(what, [])
            named += where[: NAMED - len(named)]
        self.truncated_tokens += other.truncated_tokens
        self.turns_without_end += other.turns_without_end


class Piece(NamedTuple):
    """Piece number `piece` of the `pieces` of record `row`."""

    row: int
    piece: int
    pieces: int
    tokens: Tokens


@dataclass(frozen=True)
class EncodeUnit:
    """The task that tokenizes a unit. `files` says where its files lie, for messages."""

    path: Path
    weight: int
    documents: Path
    verdicts: Path | None
    files: Mapping[str, str]
    tokenization: Tokenization
    options: Options
    workers: int

    def make(self, path: Path) -> None:
        encoder = _Encoder(self.tokenization, self.options, self.workers)
        documents = Documents(self.documents, self.files)
        verdicts = Verdicts.read(self.verdicts, len(documents))
        with pq.ParquetWriter(path, _SCHEMA, **_WRITTEN) as writer:
            pieces = encoder.pieces(documents, verdicts)
            for group in in_batches(pieces, lambda piece: len(piece.tokens.ids), GROUP_TOKENS):
                writer.write_table(_table(group))
            writer.add_key_value_metadata({"account": json.dumps(vars(encoder.account), ensure_ascii=False)})


def encoded(path: Path) -> tuple[Account, Iterator[Piece]]:
    """What an `EncodeUnit` wrote."""
    file = open_part(path)
    with reading(path):
        account = Account(**json.loads(file.metadata.metadata[b"account"]))
    return account, _pieces(path, file)


def _pieces(path: Path, file: pq.ParquetFile) -> Iterator[Piece]:
    for group in range(file.num_row_groups):
        with reading(path):
            table = file.read_row_group(group).combine_chunks()
            (_, _, ids), (_, ends, scored) = (table[name].chunk(0).buffers() for name in ("ids", "scored"))
            offsets = np.frombuffer(ends, np.int64, len(table) + 1)
            flat = np.frombuffer(ids, np.uint32, offsets[-1])
            marks = np.frombuffer(scored, np.bool_, offsets[-1])
        places = zip(*(table[name].to_pylist() for name in ("row", "piece", "pieces")), strict=True)
        for i, (row, piece, pieces) in enumerate(places):
            part = slice(offsets[i], offsets[i + 1])
            yield Piece(row, piece, pieces, Tokens(flat[part], marks[part]))


def _table(pieces: Sequence[Piece]) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum([len(piece.tokens.ids) for piece in pieces])])
    columns: list[Any] = [[getattr(piece, name) for piece in pieces] for name in ("row", "piece", "pieces")]
    for name, size in (("ids", 4), ("scored", 1)):
        flat = np.concatenate([getattr(piece.tokens, name) for piece in pieces])
        buffers = [None, pa.py_buffer(offsets * size), pa.py_buffer(flat)]
        columns.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pieces), buffers))
    return pa.table(columns, schema=_SCHEMA)


_Encoded = tuple[int, Edited, Tokens | BadRow | None]
"""Number of a record, the record, and its tokens, what is wrong with it, or None for an empty one."""


class _Encoder:
    def __init__(self, tokenization: Tokenization, options: Options, workers: int) -> None:
        self.tokenization, self.options, self.workers = tokenization, options, workers
        self.account = Account()

    def pieces(self, documents: Documents, verdicts: Verdicts) -> Iterator[Piece]:
        for row, item, tokens in self._encoded(_kept(documents, verdicts, self.account)):
            if isinstance(tokens, BadRow):
                self._skip(item.record, tokens.reason)
            elif tokens is None:
                what = "emptied by what data.clean cuts" if item.emptied else "empty"
                self.account.change(f"left out: {what}", item.record.id)
            else:
                yield from self._fitting(row, item, tokens)

    def _encoded(self, items: Iterator[tuple[int, Edited]]) -> Iterator[_Encoded]:
        """In the order of the items, a few batches ahead of what is asked for."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ropewalk-tokenize")
        pending: deque[Future[list[_Encoded]]] = deque()
        try:
            for batch in in_batches(items, _characters, BATCH_CHARACTERS, BATCH_ROWS):
                pending.append(pool.submit(self._encode, batch))
                if len(pending) > self.workers + 1:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, batch: list[tuple[int, Edited]]) -> list[_Encoded]:
        filled = [item for _, item in batch if not _empty(item)]
        unscored = [item.unscored for item in filled] if any(item.unscored for item in filled) else None
        tokens = iter(self.tokenization([item.record for item in filled], unscored))
        return [(row, item, None if _empty(item) else next(tokens)) for row, item in batch]

    def _fitting(self, row: int, item: Edited, tokens: Tokens) -> Iterator[Piece]:
        record = item.record
        pieces = self._fit(record, tokens)
        if not pieces:
            return
        if item.scored_is_masked and not tokens.scored.any():
            # No fault of the row: the recipe asked for it.
            self.account.change("left out: all that is scored is masked by data.clean", record.id)
            return
        if not any(piece.scored.any() for piece in pieces):
            self._skip(record, self._unscored(record, tokens))
            return
        self.account.turns_without_end += tokens.turns_without_end
        for i, piece in enumerate(pieces):
            if piece.scored.any():
                yield Piece(row, i, len(pieces), piece)
            else:
                where = f"{record.id} (piece {i})"
                self.account.change("left out: a piece without scored tokens", where)

    def _fit(self, record: Record, tokens: Tokens) -> list[Tokens]:
        """The document in pieces that fit in a row, as data.too_long says."""
        limit, count, policy = self.options.sequence_length, len(tokens.ids), self.options.too_long
        if count <= limit or policy == "keep":
            return [tokens]
        if policy == "auto":
            policy = "split" if record.text is not None else "error"
        if policy == "split":
            self.account.change("split", record.id)
            return split(tokens, limit, self.tokenization.begin if record.text is not None else ())
        if policy == "truncate":
            self.account.change("truncated", record.id)
            self.account.truncated_tokens += count - limit
            return [Tokens(tokens.ids[:limit], tokens.scored[:limit], tokens.turns_without_end)]
        if policy == "drop":
            self.account.change("left out: too long", record.id)
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

    def _skip(self, record: Record, reason: str) -> None:
        """Notes a bad row. Raises UserError for one more than the recipe lets pass."""
        if len(self.account.bad) >= self.options.max_bad_rows:
            raise UserError(too_many(BadRow(record.where, reason), self.options.max_bad_rows))
        self.account.bad.append((record.id, reason))


def tokenization(tokenizer: Any, options: Options) -> Tokenization:
    """Raises UserError for rows in which no document has room."""
    made = Tokenization(tokenizer, score=options.score, append_eos=options.append_eos)
    if options.sequence_length < 3 + len(made.begin):
        raise UserError(f"data.sequence_length: {options.sequence_length} is too short for any document")
    return made


def _kept(documents: Documents, verdicts: Verdicts, account: Account) -> Iterator[tuple[int, Edited]]:
    """The documents that are kept, with their row numbers, edited as the recipe says."""
    row = 0
    for records in documents.batches():
        for record in records:
            account.kinds[record.kind] += 1
            if verdicts.kept[row]:
                yield row, edited(record, verdicts.edits[row])
            row += 1


def _empty(item: Edited) -> bool:
    return item.emptied or (item.record.text is not None and not item.record.text.strip())


def _characters(item: tuple[int, Edited]) -> int:
    return item[1].record.characters
