"""How often the documents of each source come in an epoch: an epoch is as many tokens as the sources have.

With shares w (of sum 1) of the T tokens of all sources, a source of D documents and t tokens gives
n = w T D / t of its documents to every epoch, rounded, at least one. Its documents stand in a circle, in a
random order that stays the same for the whole run; epoch e takes the n documents from the (e n)-th on. So
n / D is how often a document comes in an epoch: exactly that often where it is whole, else one time more or
less, and after any number of epochs two documents of a source differ by one time at most. Nothing is left out
of a run that is long enough, and nothing comes again before the rest of its source has come.

The shares of tokens are exact over whole rounds of the circles; in one epoch they vary with the lengths of
the documents whose turn it is.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ropewalk.data.hashes import hashes
from ropewalk.data.shards import TokenShards
from ropewalk.errors import UserError

_CIRCLE = 2
"""the purpose of the hashes (0 and 1 are those of an epoch's documents and rows)"""


class Part(NamedTuple):
    """A source in a mixture: `each` of its `documents` [D] (in the order of the circle) come in an epoch."""

    name: str
    documents: np.ndarray
    each: int

    @property
    def repeats(self) -> float:
        """How often a document comes in an epoch."""
        return self.each / len(self.documents)


class Mixture:
    """The documents of every epoch. Without `weights` and with temperature 1: each of them once.

    weights: the share of each source by its name, of any sum. temperature: shares as tokens^(1/temperature),
    which gives small sources more than they have (Devlin et al. 2018; Conneau et al. 2019, arXiv 1911.02116).
    Raises UserError for a weight without documents, and for documents without weight.
    """

    def __init__(
        self, shards: TokenShards, seed: int, weights: Mapping[str, float] | None, temperature: float
    ) -> None:
        self._shards = shards
        self.parts: tuple[Part, ...] = ()
        """the sources in the order of the shards' first documents; none where each document comes once"""
        if not weights and temperature == 1.0:
            return
        names, codes = shards.sources
        tokens = np.bincount(codes, weights=shards.lengths, minlength=len(names))
        shares = _shares(shards, names, tokens, weights, temperature)
        order = np.argsort(hashes(shards.fingerprint, seed, 0, _CIRCLE, len(shards)))
        grouped = order[np.argsort(codes[order], kind="stable")]
        circles = np.split(grouped, np.cumsum(np.bincount(codes))[:-1])
        parts = []
        for code, (name, circle) in enumerate(zip(names, circles, strict=True)):
            each = round(shares[code] * float(tokens.sum()) * len(circle) / float(tokens[code]))
            parts.append(Part(name, circle, max(1, each)))
        self.parts = tuple(parts)

    @cached_property
    def fingerprint(self) -> str:
        """Of the documents and, in a mixture, of what decides how often each comes."""
        if not self.parts:
            return self._shards.fingerprint
        counts = [[part.name, part.each, len(part.documents)] for part in self.parts]
        digest = hashlib.sha256(json.dumps([self._shards.fingerprint, counts]).encode())
        digest.update(self._shards.sources[1].astype("<u4").tobytes())
        return digest.hexdigest()

    @property
    def constant(self) -> bool:
        """Whether all epochs have the same documents."""
        return all(part.each % len(part.documents) == 0 for part in self.parts)

    def documents(self, epoch: int) -> np.ndarray:
        """[n] int64 in rising order, each as often as it comes in that epoch."""
        everyone = np.arange(len(self._shards))
        if not self.parts:
            return everyone
        times = np.empty(len(self._shards), dtype=np.int64)
        for _, circle, each in self.parts:
            whole, rest = divmod(each, len(circle))
            begin = epoch * each % len(circle)
            times[circle] = whole
            times[circle[begin : begin + rest]] += 1
            times[circle[: max(0, begin + rest - len(circle))]] += 1
        return np.repeat(everyone, times)

    def repeats(self) -> dict[str, float]:
        """How often each source is seen in an epoch; of all together, as "", where none is told apart."""
        return {part.name: part.repeats for part in self.parts} or {"": 1.0}


def _shares(
    shards: TokenShards,
    names: list[str],
    tokens: np.ndarray,
    weights: Mapping[str, float] | None,
    temperature: float,
) -> list[float]:
    """Of sum 1, in the order of `names`."""
    if weights:
        missing, empty = set(names) - set(weights), set(weights) - set(names)
        if missing:
            raise UserError(
                f"{shards.directory}: source {min(missing)!r} has no weight; give all or none one"
            )
        if empty:
            raise UserError(
                f"{shards.directory}: source {min(empty)!r} has a weight and no document to train on; "
                "take it out, or see the report of its preparation"
            )
        raw = [float(weights[name]) for name in names]
    else:
        raw = [float(count) ** (1 / temperature) for count in tokens]
    return [value / sum(raw) for value in raw]
