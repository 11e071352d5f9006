"""The key-value cache of generation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.model.config import ModelConfig


class KVCache:
    """Keys and values of the tokens a model has seen, one slot per token and row.

    A model called with it appends its tokens. Rows of unequal length are padded on the left: padding has
    position -1 and is never attended. `length` tokens of every row are there, and in the slots before them as
    many virtual tokens as `reserve` was told: they are not counted, but positions are.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size, self.max_length, self.length, self.virtual = batch_size, max_length, 0, 0
        self.ragged = False
        """Whether some row has padding, so that slots and positions differ."""
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.positions = torch.full((batch_size, max_length), -1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros_like(self.positions)
        """The tokens themselves: longrope reads them again where its frequencies change."""

    @property
    def slots(self) -> int:
        """How many are used."""
        return self.virtual + self.length

    def reserve(self, count: int) -> None:
        """Make `count` slots for virtual tokens, before all others; the cache is empty."""
        more, self.virtual = count - self.virtual, count
        if more:
            for tensors in (self.keys, self.values):
                for i, t in enumerate(tensors):
                    tensors[i] = t.new_empty((*t.shape[:2], t.shape[2] + more, t.shape[3]))
            shape = (self.batch_size, self.max_length + count)
            self.positions, self.tokens = self.positions.new_full(shape, -1), self.tokens.new_zeros(shape)
            self.positions[:, :count] = torch.arange(count)

    def begin(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Take slots for tokens `[B, S]`; returns their positions, `[1, S]` if all rows agree, else `[B, S]`.

        positions None: each row goes on where it ended; else they count from 0. Those returned count from the
        first virtual token, as the model does.
        """
        batch, count = tokens.shape
        start, stop = self.slots, self.slots + count
        if batch != self.batch_size:
            raise ValueError(f"the cache has {self.batch_size} rows, the tokens {batch}")
        if self.length + count > self.max_length:
            raise RopewalkError(
                f"the key-value cache holds {self.max_length} tokens; {self.length + count} are needed: "
                "generate fewer new tokens"
            )
        plain = torch.arange(start, stop, device=tokens.device)[None]
        if positions is not None and self.virtual:
            positions = torch.where(positions < 0, positions, positions + self.virtual)
        if positions is None and not self.ragged:
            positions = plain
        elif positions is None:
            positions = self.positions[:, start - 1 : start] + 1 + (plain - start)
        elif not self.ragged:
            self.ragged = not bool((positions == plain).all())
            positions = positions if self.ragged else plain
        self.positions[:, start:stop] = positions
        self.tokens[:, start:stop] = tokens
        return positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v `[B, S, kv_heads, D]` in the slots begun; returns all, `[B, kv_heads, slots, D]`."""
        start, stop = self.slots, self.slots + k.shape[1]
        heads = k.shape[2]  # fewer than the config's where processes share them
        keys, values = self.keys[layer][:, :heads], self.values[layer][:, :heads]
        keys[:, :, start:stop] = k.transpose(1, 2)
        values[:, :, start:stop] = v.transpose(1, 2)
        return keys[:, :, :stop], values[:, :, :stop]

    def fill_virtual(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of a layer's virtual tokens, each `[virtual, kv_heads, D]`, into their slots."""
        self.keys[layer][:, :, : self.virtual] = k.transpose(0, 1)
        self.values[layer][:, :, : self.virtual] = v.transpose(0, 1)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.positions[:, self.virtual + length :] = -1
        self.length = min(self.length, length)
        self.ragged = self.ragged and self.length > 0

    def expand(self, n: int, max_length: int | None = None) -> "KVCache":
        """A copy with `n` rows of a cache with one, and room for `max_length` tokens: a prompt's beginning,
        read once and shared."""
        if self.batch_size != 1:
            raise ValueError(f"only a cache of one row can be expanded, not one of {self.batch_size}")
        copy = object.__new__(KVCache)
        copy.__dict__.update(self.__dict__)
        copy.batch_size, copy.max_length = n, max_length or self.max_length

        def widen(old: Tensor, dim: int, empty: int = 0) -> Tensor:
            shape = [n, *old.shape[1:]]
            shape[dim] = copy.virtual + copy.max_length
            new = old.new_full(shape, empty) if dim == 1 else old.new_empty(shape)
            new.narrow(dim, 0, self.slots).copy_(old.narrow(dim, 0, self.slots))
            return new

        copy.keys = [widen(t, 2) for t in self.keys]
        copy.values = [widen(t, 2) for t in self.values]
        copy.positions, copy.tokens = widen(self.positions, 1, -1), widen(self.tokens, 1)
        return copy

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, row i being what row `rows[i]` was; rows that keep their place cost nothing.

        No row moves up, so that none is overwritten before it is read: `rows[i] >= i`.
        """
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if any(old < new for new, old in moved):
            raise ValueError(f"rows can only move down: {list(rows)}")
        for new, old in moved:
            for tensors in (self.keys, self.values):
                for t in tensors:
                    t[new, :, : self.slots] = t[old, :, : self.slots]
            self.positions[new], self.tokens[new] = self.positions[old], self.tokens[old]
        self.batch_size = len(rows)
        for tensors in (self.keys, self.values):
            tensors[:] = [t[: len(rows)] for t in tensors]
        self.positions, self.tokens = self.positions[: len(rows)], self.tokens[: len(rows)]
