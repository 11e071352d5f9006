"""Where documents begin and end in a packed batch, and what attention derives from that once a batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_PADDING_PIECE = 128
"""Longest made-up document that padding is given to a kernel as."""


@dataclass(frozen=True)
class Run:
    """`count` neighbouring documents of `length` tokens each; or padding."""

    count: int
    length: int
    padding: bool = False

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass
class AttentionLayout:
    """Where documents begin and end in the flattened `[B * S]` tokens of a batch. Built once per forward."""

    runs: tuple[Run, ...]
    bands: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    """Masks of sliding windows, shared by the layers."""
    packings: dict[int, "Packing"] = field(default_factory=dict)
    """By length of the prefix; shared by the layers."""
    tiles: dict[Any, Any] = field(default_factory=dict)
    """What some queries see of some keys (`attention_parts.tiles`); shared by the layers."""

    @classmethod
    def rows(cls, batch: int, length: int) -> "AttentionLayout":
        """Each row is one document."""
        return cls((Run(batch, length),))

    @classmethod
    def from_segments(cls, segments: Tensor) -> "AttentionLayout":
        """segments `[B, S]` integers: tokens of a document share a number, neighbours differ, -1 is padding.

        Copies segments to the host if they are not there.
        """
        rows = segments.cpu()
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
        first = starts.flatten().nonzero().flatten()
        lengths = torch.diff(first, append=torch.tensor([rows.numel()])).tolist()
        paddings = (rows.flatten()[first] < 0).tolist()
        runs: list[Run] = []
        for length, padding in zip(lengths, paddings, strict=True):
            last = runs[-1] if runs else None
            if last is not None and padding and last.padding:
                runs[-1] = Run(1, last.tokens + length, True)
            elif last is not None and not padding and not last.padding and last.length == length:
                runs[-1] = Run(last.count + 1, length)
            else:
                runs.append(Run(1, length, padding))
        return cls(tuple(runs))

    def documents(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(row, first token in it, end) of each document, in order, in rows of `length` tokens."""
        at = 0
        for run in self.runs:
            for _ in range(0 if run.padding else run.count):
                row, start = divmod(at, length)
                yield row, start, start + run.length
                at += run.length
            at += run.tokens if run.padding else 0

    @cached_property
    def longest_first(self) -> list[int]:
        """First token and length of each document, one after the other, in the flattened tokens."""
        found, at = [], 0
        for run in self.runs:
            starts = range(at, at + run.tokens, run.length)
            found += [] if run.padding else [(start, run.length) for start in starts]
            at += run.tokens
        return [number for pair in sorted(found, key=lambda pair: -pair[1]) for number in pair]

    def segments(self, batch: int, device: torch.device) -> Tensor:
        """`[B, S]`: the number of each token's document, counted through the batch; -1 is padding."""
        numbers: list[int] = []
        for run in self.runs:
            numbers += [-1] if run.padding else range(len(numbers), len(numbers) + run.count)
        lengths = [run.length for run in self.runs for _ in range(run.count)]
        return torch.tensor(numbers).repeat_interleave(torch.tensor(lengths)).view(batch, -1).to(device)

    def band(
        self, window: int, queries: int, before: int, device: torch.device, dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """`[queries, before + queries]`: query i sees the keys up to `before + i`, `window` of them.

        In a floating dtype it is 0 and -inf, to be added: torch's kernels make that of a bool mask in each
        call, and keep it for the backward pass.
        """
        key = (window, queries, before, dtype)
        if key not in self.bands:
            band = causal_band(window, queries, before, device)
            if dtype != torch.bool:
                band = torch.zeros(band.shape, dtype=dtype, device=device).masked_fill_(~band, -torch.inf)
            self.bands[key] = band
        return self.bands[key]

    def packing(self, prefix: int, device: torch.device) -> "Packing":
        """The documents, each after a prefix of so many keys, as kernels for packed documents want them."""
        if prefix not in self.packings:
            self.packings[prefix] = Packing.make(self.runs, prefix, device)
        return self.packings[prefix]


def causal_band(window: int, queries: int, before: int, device: torch.device) -> Tensor:
    """What `AttentionLayout.band` gives, made anew."""
    query = torch.arange(before, before + queries, device=device)[:, None]
    distance = query - torch.arange(before + queries, device=device)
    return (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class Packing:
    """Documents laid end to end; padding is cut into short documents, so that they cover every token."""

    query_starts: Tensor
    """`[documents + 1]` int32: where each begins among the queries, and the end of the last"""
    key_starts: Tensor
    """the same among the keys, where a prefix stands before each document"""
    longest: int
    """queries of the longest document"""
    keys: Tensor | None
    """`[documents * P + B * S]`: which of the P prefix keys and B * S keys stands there; None: no prefix"""
    padding: Tensor | None
    """`[B * S]` bool; None: there is none"""

    @classmethod
    def make(cls, runs: tuple[Run, ...], prefix: int, device: torch.device) -> "Packing":
        lengths: list[int] = []
        for run in runs:
            piece = _PADDING_PIECE if run.padding else run.length
            whole, rest = divmod(run.tokens, piece)
            lengths += [piece] * whole + [rest] * bool(rest)
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        keys = padding = None
        if prefix:
            begins = (ends - sizes).tolist()
            first = torch.arange(prefix)
            parts = [
                part
                for start, size in zip(begins, lengths, strict=True)
                for part in (first, torch.arange(prefix + start, prefix + start + size))
            ]
            keys = torch.cat(parts).to(device)
        if any(run.padding for run in runs):
            tokens = torch.tensor([run.tokens for run in runs])
            padding = torch.tensor([run.padding for run in runs]).repeat_interleave(tokens).to(device)
        key_ends = (sizes + prefix).cumsum(0)
        zero = torch.zeros(1, dtype=torch.int64)
        starts, key_starts = (torch.cat((zero, e)).to(device, torch.int32) for e in (ends, key_ends))
        return cls(starts, key_starts, max(lengths), keys, padding)
