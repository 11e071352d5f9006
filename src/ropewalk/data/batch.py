"""What the loader hands to the training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents. All tensors are `[B, S]`.

    tokens     int64, token ids; padding at the end of a row is any valid id
    labels     int64, the token to predict *at* each position (already shifted left by one
               within its document); -100 where nothing is scored
    positions  int64, index within the document, or what the row has of it, from 0; 0 in padding
    segments   int64, index of the document in its row, from 0, in increasing runs; -1 in padding
    documents  for each row, the ids of its documents in order (for error messages), a tuple for each row
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    documents: Sequence[tuple[str, ...]] = ()

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies while it computes."""
        parts = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "documents"}
        return Batch(**parts, documents=self.documents)

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows `[start, stop)`: one micro-batch."""
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)}
        return Batch(**cut)


class DocumentIds(Sequence[tuple[str, ...]]):
    """`Batch.documents` as numbers, whose ids are asked for when somebody wants to see one: few do, and the
    table of all ids is large. Row i has the numbers from ends[i - 1] to ends[i]."""

    def __init__(
        self, ends: np.ndarray, numbers: np.ndarray, ids: Callable[[np.ndarray], Sequence[str]]
    ) -> None:
        self._ends, self._numbers, self._ids = ends, numbers, ids

    @cached_property
    def _rows(self) -> tuple[tuple[str, ...], ...]:
        ids, edges = self._ids(self._numbers), [0, *self._ends.tolist()]
        return tuple(tuple(ids[a:b]) for a, b in pairwise(edges))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, rows: Any) -> Any:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            return self._rows[rows]
        first, stop, _ = rows.indices(len(self))
        edges = np.concatenate([[0], self._ends])[first : max(first, stop) + 1]
        return DocumentIds(edges[1:] - edges[0], self._numbers[edges[0] : edges[-1]], self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._rows == tuple(other)

    def __hash__(self) -> int:
        return hash(self._rows)
