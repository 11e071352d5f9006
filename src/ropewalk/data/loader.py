"""Batches as a pure function of (the shards' fingerprint, seed, number of the first row).

An epoch is: the documents in a random order dealt to the places of the packing (each to one of its own
length), then the rows in a random order. Nothing is drawn one after the other: every order is the sort
order of hashes of (fingerprint, seed, epoch, index), so that any row of any epoch is found at once, and
no version of a library can change it.
"""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch

from ropewalk.data.batch import Batch
from ropewalk.data.packing import PackingName, pack
from ropewalk.data.shards import TokenShards
from ropewalk.errors import UserError

UNSCORED = -100


class Loader:
    """Rows of `sequence_length` tokens, without end; row i belongs to epoch i // rows_per_epoch.

    Raises UserError for shards without documents, or with one longer than a row.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        packing: PackingName = "best_fit",
        batch_size: int = 1,
        seed: int = 0,
        pad_id: int = 0,
    ) -> None:
        if not len(shards):
            raise UserError(f"{shards.directory}: no documents")
        if shards.lengths.max() > sequence_length:
            raise UserError(
                f"{shards.directory}: has a document of {shards.lengths.max():,} tokens, and rows are "
                f"{sequence_length:,} long; prepare the data with this data.sequence_length"
            )
        self.shards = shards
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.pad_id = pad_id
        self._rows = pack(shards.lengths, sequence_length, packing)
        self._by_length = np.argsort(self._rows.lengths, kind="stable")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """The same in every epoch: packing looks at lengths only."""
        return len(self._rows)

    def state(self, samples_seen: int) -> dict[str, Any]:
        """All there is to know about a position in the data."""
        return {"fingerprint": self.shards.fingerprint, "seed": self.seed, "samples_seen": samples_seen}

    def batch(self, first_sample: int, rows: int | None = None) -> Batch:
        """Rows `first_sample` to `first_sample + rows` (by default batch_size of them)."""
        wanted = np.arange(first_sample, first_sample + (self.batch_size if rows is None else rows))
        epochs, within = np.divmod(wanted, len(self._rows))
        documents: list[np.ndarray] = []
        for epoch, row in zip(epochs.tolist(), within.tolist(), strict=True):
            places, order = self._epoch(epoch)
            row = order[row]
            documents.append(places[self._rows.starts[row] : self._rows.starts[row + 1]])
        return self._assemble(documents)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(document in each place of the packing, order of its rows)."""
        found = self._epochs.get(epoch)
        if found is None:
            shuffled = np.argsort(self._hashes(epoch, 0, len(self.shards)), kind="stable")
            places = np.empty(len(self.shards), dtype=np.int64)
            places[self._by_length] = shuffled[np.argsort(self.shards.lengths[shuffled], kind="stable")]
            found = places, np.argsort(self._hashes(epoch, 1, len(self._rows)), kind="stable")
            # Two, since a batch can lie in both; replaced whole, since a thread may be reading the old one.
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found

    def _hashes(self, epoch: int, purpose: int, count: int) -> np.ndarray:
        """[count] uint64: splitmix64 (Steele, Lea, Flood 2014) of the index, begun from all the rest."""
        start = int(self.shards.fingerprint[:16], 16)
        for part in (self.seed, epoch, purpose):
            start = int(_splitmix(np.array([(start ^ part) & (2**64 - 1)], dtype=np.uint64))[0])
        return _splitmix(np.uint64(start) ^ np.arange(count, dtype=np.uint64))

    def _assemble(self, rows: list[np.ndarray]) -> Batch:
        """All rows at once, the padding at the end of each as one more document of token 0 of shard 0."""
        shape = len(rows), self.sequence_length
        counts = np.array([len(row) for row in rows])
        documents = np.concatenate(rows)
        real = np.ones(len(documents) + len(rows), dtype=bool)
        padding = np.cumsum(counts + 1) - 1
        real[padding] = False
        held = self.shards.lengths[documents]
        used = np.add.reduceat(held, np.cumsum(counts) - counts)
        lengths, starts, shard, segment = np.zeros((4, len(real)), dtype=np.int64)
        lengths[real], lengths[padding] = held, self.sequence_length - used
        starts[real], shard[real] = self.shards.starts[documents], self.shards.shard[documents]
        segment[real] = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        segment[padding] = -1

        positions = np.repeat(np.cumsum(lengths) - lengths, lengths)
        np.subtract(np.arange(len(positions)), positions, out=positions)
        for row, begin in zip(positions.reshape(shape), used.tolist(), strict=True):
            row[begin:] = 0
        at = np.repeat(starts, lengths)
        at += positions
        read, scored = self.shards.read(at, shard, lengths)
        tokens = read.astype(np.int64).reshape(shape)
        # The label at a position is the next token. The first token of a document is never scored, so that
        # the last position before it, of another document or another row, gets no label; nor does padding.
        labels = np.full(len(at), UNSCORED)
        np.copyto(labels[:-1], read[1:], where=scored[1:])
        for row, begin in zip(tokens, used.tolist(), strict=True):
            row[begin:] = self.pad_id
        ids, ends = self.shards.ids(documents), np.cumsum(counts).tolist()
        names = tuple(tuple(ids[end - len(row) : end]) for row, end in zip(rows, ends, strict=True))
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels.reshape(shape)),
            positions=torch.from_numpy(positions.reshape(shape)),
            segments=torch.from_numpy(np.repeat(segment, lengths).reshape(shape)),
            documents=names,
        )


def _splitmix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


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
