"""Batches as a pure function of (the shards' fingerprint, seed, settings, number of the first row).

Which documents a row holds is decided in order.py; here their tokens are read, and made into tensors.
"""

import queue
import threading
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ropewalk.data.batch import Batch, DocumentIds
from ropewalk.data.mixture import Mixture
from ropewalk.data.order import Curriculum, Order, Pieces
from ropewalk.data.packing import PackingName
from ropewalk.data.shards import TokenShards

UNSCORED = -100


class Loader:
    """Rows of `sequence_length` tokens, without end: epoch after epoch of the mixture (see mixture.py).

    packing: best_fit and none keep documents whole; concat lays them end to end and cuts at the rows' ends.
    What is cut off goes on in another row as a segment of its own, at position 0: nothing before it can be
    seen there, as in a text without its beginning, and positions stay below the row's length, however long
    the document is. Its first token is not scored. Each token of a document is in one row.
    weights, temperature: see `Mixture`. curriculum: see order.py.
    Raises UserError as `Order` and `Mixture` do.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        packing: PackingName = "best_fit",
        batch_size: int = 1,
        seed: int = 0,
        pad_id: int = 0,
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        curriculum: Curriculum = "none",
    ) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.mixture = Mixture(shards, seed, weights, temperature)
        self.order = Order(shards, sequence_length, packing, seed, self.mixture, curriculum)

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """The same in every epoch, but in a mixture with repeats that are not whole numbers."""
        return self.order.rows_in(epoch)

    def epochs(self, samples: int) -> float:
        """Epochs, whole and part, that so many rows are."""
        epoch, row = self.order.find(samples)
        return epoch + row / self.order.rows_in(epoch)

    def passes(self, samples: int) -> dict[str, float]:
        """How often so many rows show a document of each source (of all, as "", without a mixture)."""
        epochs = self.epochs(samples)
        return {name: epochs * repeats for name, repeats in self.mixture.repeats().items()}

    def state(self, samples_seen: int) -> dict[str, Any]:
        """All there is to know about a position in the data."""
        return {"fingerprint": self.mixture.fingerprint, "seed": self.seed, "samples_seen": samples_seen}

    def batch(self, first_sample: int, rows: int | None = None) -> Batch:
        """Rows `first_sample` to `first_sample + rows` (by default batch_size of them)."""
        return self._assemble(self.order.pieces(first_sample, self.batch_size if rows is None else rows))

    def _assemble(self, pieces: Pieces) -> Batch:
        """All rows at once. The padding at a row's end is first read as if its last piece went on."""
        counts, documents, offsets, held = pieces
        shape = len(counts), self.sequence_length
        ends = np.cumsum(counts)
        used = np.add.reduceat(held, ends - counts)
        lengths = held.copy()
        lengths[ends - 1] += self.sequence_length - used
        begins = np.cumsum(lengths) - lengths
        starts = self.shards.starts[documents] + offsets
        places = np.arange(shape[0] * shape[1])
        at = np.repeat(starts - begins, lengths)
        at += places
        read, scored = self.shards.read(at, self.shards.shard[documents], lengths)
        scored[:: self.sequence_length] = False  # a row may begin inside a document
        tokens = read.astype(np.int64)
        positions = np.subtract(places, np.repeat(begins, lengths), out=places)
        segments = np.repeat(np.arange(len(held)) - np.repeat(ends - counts, counts), lengths)
        for row in np.flatnonzero(used < self.sequence_length).tolist():
            padding = slice(row * self.sequence_length + used[row], (row + 1) * self.sequence_length)
            tokens[padding], scored[padding], positions[padding], segments[padding] = (
                self.pad_id,
                False,
                0,
                -1,
            )
        # The label at a position is the next token. The first token of a document or row is never scored,
        # so that the last position before it, of another document or row, gets no label; nor does padding.
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        np.copyto(labels[:-1], UNSCORED, where=~scored[1:])
        labels[-1] = UNSCORED
        return Batch(
            tokens=torch.from_numpy(tokens.reshape(shape)),
            labels=torch.from_numpy(labels.reshape(shape)),
            positions=torch.from_numpy(positions.reshape(shape)),
            segments=torch.from_numpy(segments.reshape(shape)),
            documents=DocumentIds(ends, documents, self.shards.ids),
        )


def prefetch(
    loader: Loader, firsts: Iterable[int], rows: int, depth: int = 2, pin: bool = False
) -> Generator[Batch]:
    """Batches of `rows` rows from each of the rows `firsts` on, made ahead by a thread, pinned for a GPU.

    An error of the thread is raised here. Close the iterator (or use it up) to end the thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for first in firsts:
                if stop.is_set():
                    return
                batch = loader.batch(first, rows)
                offer(batch.pinned() if pin else batch)
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="ropewalk-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
