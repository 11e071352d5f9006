"""Token shards from encoded units, one after the other, with a ledger of every document that was read."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.data.attributes import Unit
from ropewalk.data.documents import too_many
from ropewalk.data.encode import Options, encoded
from ropewalk.data.part_files import PART
from ropewalk.data.records import BadRow
from ropewalk.data.report import Tally
from ropewalk.data.shards import ShardWriter
from ropewalk.data.verdicts import Verdicts
from ropewalk.errors import UserError

LEDGER = "documents.parquet"
_LEDGER = pa.schema(
    {
        **{name: pa.string() for name in ("id", "source", "file")},
        **{name: pa.int64() for name in ("line", "start", "end")},
        "url": pa.string(),
        "hash": pa.uint64(),
        "split": pa.string(),
        "piece": pa.int64(),
        "pieces": pa.int32(),
        "verdict": pa.string(),
        "failed": pa.list_(pa.string()),
        "duplicate_of": pa.int64(),
    }
)
"""split: where its tokens are, null where it has none: `pieces` documents of those token shards, from number
`piece` on; verdict, failed: see verdicts.py; duplicate_of: a row of this table, or -1."""


class Build:
    """Writes `train`, `validation` and the ledger below `folder`."""

    def __init__(self, folder: Path, tokenizer: Any, options: Options, has_template: bool) -> None:
        self.options, self.folder, self.tokenizer = options, folder, tokenizer
        self.has_template = has_template
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.writers: dict[str, ShardWriter] = {}
        self.tally = Tally()
        self._ledger = pq.ParquetWriter(folder / LEDGER, _LEDGER, **PART)

    def add(self, unit: Unit, verdict: Path | None, tokens: Path) -> None:
        """A unit. Raises UserError for more bad rows, all units together, than the recipe lets pass."""
        documents = unit.read()
        verdicts = Verdicts.read(verdict, len(documents)).table
        account, pieces = encoded(tokens)
        for bad in (*documents.bad, *(BadRow(*bad) for bad in account.bad)):
            if len(self.tally.skipped) >= self.options.max_bad_rows:
                raise UserError(too_many(bad, self.options.max_bad_rows))
            self.tally.skipped.append(bad)
        self.tally.account.add(account)
        table = documents.columns(*_LEDGER.names[:8])
        ids, sources = table["id"].to_pylist(), table["source"].to_pylist()
        hashes = table["hash"].to_pylist()
        scores = verdicts["score"].to_pylist()
        split: list[str | None] = [None] * len(ids)
        places = np.zeros((len(ids), 2), np.int64)
        for row, piece, count, part in pieces:
            name = split[row]
            if name is None:
                share = self.options.validation_fraction
                held = unit.held_out or _held_out(hashes[row], self.options.seed, share)
                name = split[row] = "validation" if held else "train"
                self.tally.document(not held, hashes[row], ids[row], part)
                places[row, 0] = len(self.tally.splits[name].lengths)
            if name not in self.writers:
                self.writers[name] = ShardWriter(self.folder / name, self.vocab_size)
            id = ids[row] if count == 1 else f"{ids[row]}#{piece}"
            self.writers[name].add(part.ids, part.scored, id, sources[row], scores[row])
            self.tally.splits[name].add(sources[row], part)
            places[row, 1] += 1
        self.tally.dropped.update(verdicts["verdict"].drop_null().to_pylist())
        columns = [*table.columns, pa.array(split, pa.string()), *map(pa.array, places.T)]
        columns += [verdicts[name] for name in _LEDGER.names[-3:]]
        self._ledger.write_table(pa.table(columns, names=_LEDGER.names).cast(_LEDGER))

    def finish(self) -> dict[str, Any]:
        """Closes the shards; the report. Raises UserError where nothing is left to train on."""
        self._ledger.close()
        options, held_out = self.options, len(self.tally.validation.lengths)
        if not self.tally.train.lengths:
            why = [f"{count:,} {what}" for what, count in self.tally.account.changes.items()]
            why += [f"{count:,} dropped by rule {rule}" for rule, count in self.tally.dropped.most_common()]
            if held_out and options.validation_fraction:
                held = f"{held_out:,} held out by data.validation_fraction={options.validation_fraction:g}"
                why.append(f"{held} (lower it, or name data.validation)")
            raise UserError(f"no documents are left to train on: {', '.join(why) or 'there were none'}")
        for writer in self.writers.values():
            writer.close()
        if self.tally.account.kinds["prompts with completions"]:
            how = (
                "rendered as user and assistant turns"
                if self.has_template
                else "put together without a chat template"
            )
            self.tally.notes.append(f"prompts with completions are {how}")
        if options.validation_fraction and not held_out:
            self.tally.notes.append(
                f"data.validation_fraction={options.validation_fraction:g} of so few documents is none"
            )
        return self.tally.report(self.tokenizer, options.sequence_length)


def _held_out(content_hash: int, seed: int, share: float) -> bool:
    """By content and seed alone: equal documents go to the same side, whatever else is in the data."""
    digest = hashlib.blake2b(f"{seed}:{content_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
