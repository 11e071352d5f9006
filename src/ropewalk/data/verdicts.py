"""Which documents of a unit are kept, what dropped the others, and the edits of those that are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.data.edits import Action, Edit
from ropewalk.data.part_files import read_part

SCHEMA = pa.schema(
    {
        "verdict": pa.string(),
        "failed": pa.list_(pa.string()),
        "duplicate_of": pa.int64(),
        "score": pa.float64(),
        "edits": pa.list_(
            pa.struct({"start": pa.int32(), "end": pa.int32(), "action": pa.string(), "kind": pa.string()})
        ),
    }
)
"""verdict: the rule that dropped the document, null where it is kept; failed: every rule that would have;
duplicate_of: number, in the whole data, of the document kept in its stead, else -1; score: what the recipe
orders documents by, null where it does not."""


@dataclass(frozen=True)
class Verdicts:
    """A row for each document of a unit."""

    table: pa.Table

    @classmethod
    def read(cls, path: Path | None, rows: int = 0, columns: Sequence[str] | None = None) -> "Verdicts":
        """Of a unit without a file of them all `rows` are kept as they are. `columns`: only these."""
        if path is not None:
            return cls(read_part(path, columns))
        nothing = {name: pa.nulls(rows, SCHEMA.field(name).type) for name in columns or SCHEMA.names}
        if "duplicate_of" in nothing:
            nothing["duplicate_of"] = pa.array(np.full(rows, -1))
        return cls(pa.table(nothing))

    @cached_property
    def kept(self) -> np.ndarray:
        """[documents] bool."""
        return self.table["verdict"].is_null().to_numpy()

    @cached_property
    def edits(self) -> list[list[Edit]]:
        """Of each document."""
        return [[Edit(**edit) for edit in edits or ()] for edits in self.table["edits"].to_pylist()]


def edits_column(spans: Mapping[str, tuple[Action, pa.Array]], rows: int) -> pa.Array:
    """The column of edits from attributes with places: name -> (what becomes of them, SPANS [rows])."""
    listed: list[list[dict[str, Any]]] = [[] for _ in range(rows)]
    for action, column in spans.values():
        for row, places in enumerate(column.to_pylist()):
            listed[row] += [{**place, "action": action} for place in places or ()]
    return pa.array(listed, SCHEMA.field("edits").type)
