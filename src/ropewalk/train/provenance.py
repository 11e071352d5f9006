"""From a step of a run to the documents in it and the files that they are from, and back: one query each way.

The tables of the query, which `sql` may ask as well:
    steps      step, batch, row, slot (place in the row), document (number among the token shards' documents),
               first (token of it), tokens
    pieces     document, shard, start, end: where its tokens lie in train/
    documents  the ledger of everything that was read (see data.build): id, file, line, split, verdict, ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.arrays import within
from ropewalk.data import Loader
from ropewalk.data.build import LEDGER
from ropewalk.errors import UserError
from ropewalk.recipe import load_recipe, resolve
from ropewalk.track import RunDirectory
from ropewalk.train.build import load_run_tokenizer
from ropewalk.train.entry import same_data
from ropewalk.train.job import rows_of, total_steps
from ropewalk.train.spikes import Spikes

TRACE = """
SELECT steps.step, steps."row", steps.slot, documents.id, documents.source, documents.file, documents.line,
  steps.first, steps.tokens, pieces.shard, pieces."start" + steps.first AS shard_token
FROM steps
JOIN pieces USING (document)
JOIN documents ON documents.split = 'train'
  AND steps.document BETWEEN documents.piece AND documents.piece + documents.pieces - 1
ORDER BY steps.step, steps."row", steps.slot
"""
WHERE = """
SELECT documents.id, documents.source, documents.file, documents.line, documents."start", documents."end",
  documents.split, documents.verdict, documents.failed, other.id AS duplicate_of, documents.pieces,
  (SELECT list(DISTINCT steps.step ORDER BY steps.step) FROM steps
    WHERE documents.split = 'train' AND documents.pieces > 0
    AND steps.document BETWEEN documents.piece AND documents.piece + documents.pieces - 1) AS steps
FROM documents LEFT JOIN documents AS other ON other."row" = documents.duplicate_of
WHERE documents.id = $id
"""


@dataclass(frozen=True)
class Provenance:
    """A run's, or a prepared folder's: `loader` is None for the latter, which has no steps yet."""

    data: Path
    loader: Loader | None
    steps: int
    rows: int
    """a step"""
    spikes: Spikes

    @classmethod
    def open(cls, folder: str | Path) -> "Provenance":
        """Raises UserError for what is neither a run nor prepared data."""
        folder = Path(folder)
        if (folder / LEDGER).is_file():
            return cls(folder, None, 0, 0, Spikes(1))
        directory = RunDirectory.open(folder)
        recipe = resolve(load_recipe(directory.path / "recipe.yaml")).recipe
        loader = rows_of(recipe, same_data(directory, recipe)[0], load_run_tokenizer(recipe))
        rollbacks = [record for record in directory.read() if record["kind"] == "rollback"]
        spikes = Spikes(1, left_out=rollbacks[-1]["left_out"] if rollbacks else [])
        data = loader.shards.directory.parent
        if not (data / LEDGER).is_file():
            raise UserError(f"{data}: was prepared without a ledger; prepare the data again")
        return cls(data, loader, total_steps(recipe, loader), recipe.train.batch_size or 1, spikes)

    def trace(self, step: int) -> pa.Table:
        """The documents in a step. Raises UserError where the run has no such step."""
        if not 1 <= step <= self.steps:
            has = f"the run has the steps 1 to {self.steps}" if self.loader else "prepared data has no steps"
            raise UserError(f"--step {step}: {has}")
        return self.sql(TRACE, first=step, last=step)

    def where(self, id: str) -> dict[str, Any]:
        """What became of a document, and the steps that see it. Raises UserError where there is none."""
        found = self.sql(WHERE, {"id": id}).to_pylist()
        if not found:
            near = self.sql("SELECT id FROM documents ORDER BY levenshtein(id, $id), id LIMIT 1", {"id": id})
            hint = f"; did you mean {near['id'][0]}?" if len(near) else ""
            raise UserError(f"{id}: no such document in {self.data}{hint}")
        return found[0]

    def sql(
        self, query: str, values: dict[str, Any] | None = None, first: int = 1, last: int | None = None
    ) -> pa.Table:
        """A query over the tables named above; `steps` has those from `first` to `last` (by default all)."""
        try:
            import duckdb
        except ImportError:
            raise UserError('lineage needs an extra: pip install "ropewalk[data]"') from None
        ledger = str(self.data / LEDGER).replace("'", "''")
        pieces = str(self.data / "train" / "documents.parquet").replace("'", "''")
        with duckdb.connect() as connection:
            connection.execute(
                f'CREATE VIEW documents AS SELECT *, file_row_number AS "row" '
                f"FROM read_parquet('{ledger}', file_row_number = true)"
            )
            connection.execute(
                f'CREATE VIEW pieces AS SELECT file_row_number AS document, shard, "start", "end" '
                f"FROM read_parquet('{pieces}', file_row_number = true)"
            )
            connection.register("steps", self._steps(first, self.steps if last is None else last))
            connection.execute(f"SET allowed_paths = ['{ledger}', '{pieces}']")
            connection.execute("SET enable_external_access = false; SET lock_configuration = true")
            try:
                found = connection.sql(query, params=values)
                if found is None:
                    raise UserError("--sql: gives no table; ask with SELECT")
                return found.to_arrow_table()
            except duckdb.Error as error:
                raise UserError(f"--sql: {str(error).splitlines()[0]}") from None

    def _steps(self, first: int, last: int) -> pa.Table:
        names = ("step", "batch", "row", "slot", "document", "first", "tokens")
        columns: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in names]
        for step in range(first, last + 1) if self.loader else ():
            assert self.loader is not None
            batch = self.spikes.batch(step)
            pieces = self.loader.order.pieces(batch * self.rows, self.rows)
            count = len(pieces.documents)
            row = np.repeat(np.arange(self.rows), pieces.counts)
            slot = within(pieces.counts)
            values = (np.full(count, step), np.full(count, batch), row, slot, *pieces[1:])
            for column, new in zip(columns, values, strict=True):
                column.append(new)
        return pa.table(dict(zip(names, map(np.concatenate, columns), strict=True)))
