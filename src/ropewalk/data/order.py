"""Which documents each row of each epoch holds, as a pure function of (fingerprint, seed, settings, number).

An epoch is: the documents of the mixture in a random order, put into rows by the packing, and the rows in
a random order. best_fit and none deal the documents to the places of the packing, each to one of its own
length. concat lays them end to end and cuts at the rows' ends; the last row is filled up with padding.

With a curriculum the documents are first parted by length or score into STAGES parts of about equally many
tokens, the shortest or lowest first. Each stage is put into rows by itself as above, so that inside it the
order is random.
"""

from bisect import bisect_right
from typing import Literal, NamedTuple

import numpy as np

from ropewalk.data.hashes import hashes
from ropewalk.data.mixture import Mixture
from ropewalk.data.packing import PackingName, Rows, pack
from ropewalk.data.shards import TokenShards
from ropewalk.errors import UserError

Curriculum = Literal["none", "length", "score"]
STAGES = 10
_DOCUMENTS, _ROWS, _TIES = 0, 1, 3
"""purposes of hashes (2 is the mixture's)"""


class Pieces(NamedTuple):
    """What some rows hold, one after the other: row i has counts[i] pieces. All arrays int64.

    A piece is `lengths` tokens of a document from its token `offsets` on.
    """

    counts: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


class _Stage(NamedTuple):
    """What is the same in each epoch that has the same documents. `slots` are places in the epoch's list of
    documents; concat has no places of a packing."""

    slots: np.ndarray
    rows: int
    packed: Rows | None
    by_length: np.ndarray


class _Epoch(NamedTuple):
    """`documents` in their places. Row r of the packing has those from starts[r] to starts[r + 1]; with
    concat those that lie in the tokens r S to (r + 1) S, where document i begins at begins[i]."""

    documents: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    begins: np.ndarray | None


class Order:
    """Raises UserError for shards without documents, for a document longer than a row (but with concat), and
    for a curriculum by scores that the shards do not have."""

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        packing: PackingName,
        seed: int,
        mixture: Mixture,
        curriculum: Curriculum,
    ) -> None:
        if not len(shards):
            raise UserError(f"{shards.directory}: no documents")
        if packing != "concat" and shards.lengths.max() > sequence_length:
            raise UserError(
                f"{shards.directory}: has a document of {shards.lengths.max():,} tokens, and rows are "
                f"{sequence_length:,} long; prepare the data with this data.sequence_length"
            )
        if curriculum == "score" and shards.scores is None:
            raise UserError(
                f"{shards.directory}: its documents have no scores; set data.curriculum to length or none"
            )
        self.mixture, self._shards, self._seed = mixture, shards, seed
        self._row_tokens, self._packing, self._curriculum = sequence_length, packing, curriculum
        # Two threads may read here: what is kept is replaced whole, at worst something is computed twice.
        self._ends: list[int] = []  # rows up to the end of each epoch so far, where epochs differ
        self._stages: dict[int, tuple[np.ndarray, list[_Stage]]] = {}
        self._epochs: dict[int, _Epoch] = {}

    def rows_in(self, epoch: int) -> int:
        """Rows of an epoch: the same in all that have the same documents."""
        return sum(stage.rows for stage in self._stages_of(epoch)[1])

    def find(self, sample: int) -> tuple[int, int]:
        """(epoch, row) of a sample of the run."""
        if self.mixture.constant:
            return divmod(sample, self.rows_in(0))
        ends = self._ends
        while not ends or ends[-1] <= sample:
            ends = [*ends, (ends[-1] if ends else 0) + self.rows_in(len(ends))]
        if len(ends) > len(self._ends):
            self._ends = ends
        epoch = bisect_right(ends, sample)
        return epoch, sample - (ends[epoch - 1] if epoch else 0)

    def pieces(self, first: int, count: int) -> Pieces:
        """What the samples from `first` to `first + count` hold."""
        found = []
        while count:
            epoch, row = self.find(first)
            here = min(count, self.rows_in(epoch) - row)
            found.append(self._pieces(epoch, row, row + here))
            first, count = first + here, count - here
        return found[0] if len(found) == 1 else Pieces(*map(np.concatenate, zip(*found, strict=True)))

    def _pieces(self, epoch: int, first: int, stop: int) -> Pieces:
        documents, order, starts, begins = self._epoch(epoch)
        rows = order[first:stop]
        if begins is None:
            firsts, counts = starts[rows], starts[rows + 1] - starts[rows]
        else:
            row_begins = rows * self._row_tokens
            firsts = np.searchsorted(begins, row_begins, side="right") - 1
            counts = np.searchsorted(begins, row_begins + self._row_tokens) - firsts
        at = np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        held = documents[at]
        lengths = self._shards.lengths[held]
        offsets = np.zeros_like(lengths)
        if begins is not None:
            begin = begins[at] - np.repeat(row_begins, counts)
            offsets = np.maximum(-begin, 0)
            lengths = np.minimum(begin + lengths, self._row_tokens) - np.maximum(begin, 0)
        return Pieces(counts, held, offsets, lengths)

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._arranged(epoch)
            # Two, since a batch can lie in both.
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found

    def _arranged(self, epoch: int) -> _Epoch:
        members, stages = self._stages_of(epoch)
        random = self._hashes(epoch, _DOCUMENTS, len(members))
        rows = self._hashes(epoch, _ROWS, sum(stage.rows for stage in stages))
        documents, order, starts, begins = [], [], [np.zeros(1, dtype=np.int64)], []
        row = place = 0
        for stage in stages:
            shuffled = members[stage.slots[np.argsort(random[stage.slots])]]
            lengths = self._shards.lengths[shuffled]
            if stage.packed is None:
                begins.append(row * self._row_tokens + np.cumsum(lengths) - lengths)
            else:
                starts.append(place + stage.packed.starts[1:])
                shuffled[stage.by_length] = shuffled[_by_length(lengths)]
            documents.append(shuffled)
            order.append(row + np.argsort(rows[row : row + stage.rows]))
            row, place = row + stage.rows, place + len(shuffled)
        joined = np.concatenate
        return _Epoch(joined(documents), joined(order), joined(starts), joined(begins) if begins else None)

    def _stages_of(self, epoch: int) -> tuple[np.ndarray, list[_Stage]]:
        """(the epoch's documents, its stages); found once for all epochs that have the same documents."""
        epoch = 0 if self.mixture.constant else epoch
        found = self._stages.get(epoch)
        if found is None:
            members = self.mixture.documents(epoch)
            found = members, [self._stage(members, slots) for slots in self._parted(members)]
            self._stages = {**dict(list(self._stages.items())[-1:]), epoch: found}
        return found

    def _stage(self, members: np.ndarray, slots: np.ndarray) -> _Stage:
        lengths = self._shards.lengths[members[slots]]
        if self._packing == "concat":
            return _Stage(slots, -(-int(lengths.sum()) // self._row_tokens), None, slots[:0])
        packed = pack(lengths, self._row_tokens, self._packing)
        return _Stage(slots, len(packed), packed, _by_length(packed.lengths))

    def _parted(self, members: np.ndarray) -> list[np.ndarray]:
        """The slots of each stage; equal lengths or scores at a border are parted at random."""
        if self._curriculum == "none":
            return [np.arange(len(members))]
        order = np.argsort(self._hashes(0, _TIES, len(members)))
        lengths, scores = self._shards.lengths[members[order]], self._shards.scores
        if self._curriculum == "length":
            order = order[_by_length(lengths)]
        else:
            assert scores is not None  # looked at in the beginning
            order = order[np.argsort(scores[members[order]], kind="stable")]
        lengths = self._shards.lengths[members[order]]
        before = np.cumsum(lengths) - lengths
        edges = np.searchsorted(before * STAGES, np.arange(1, STAGES) * int(lengths.sum()))
        return [slots for slots in np.split(order, edges) if len(slots)]

    def _hashes(self, epoch: int, purpose: int, count: int) -> np.ndarray:
        return hashes(self._shards.fingerprint, self._seed, epoch, purpose, count)


def _by_length(lengths: np.ndarray) -> np.ndarray:
    """Stable order of lengths; those of 16 bits are sorted by radix, six times as fast."""
    return np.argsort(lengths.astype(np.uint16) if lengths.max() < 1 << 16 else lengths, kind="stable")
