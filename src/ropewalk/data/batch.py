"""What the loader hands to the training step."""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents. All tensors are `[B, S]`.

    tokens     int64, token ids; padding at the end of a row is any valid id
    labels     int64, the token to predict *at* each position (already shifted left by one
               within its document); -100 where nothing is scored
    positions  int64, index within the document, or what the row has of it, from 0; 0 in padding
    segments   int64, index of the document in its row, from 0, in increasing runs; -1 in padding
    documents  for each row, the ids of its documents in order (for error messages)
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    documents: tuple[tuple[str, ...], ...] = ()

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies while it computes."""
        parts = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "documents"}
        return Batch(**parts, documents=self.documents)

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows `[start, stop)`: one micro-batch."""
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)}
        return Batch(**cut)
