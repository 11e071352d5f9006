"""Context parallelism: the processes of a `context` group share the tokens of each row.

Each computes embeddings, norms, products and losses of its tokens. Only attention needs the others', and
gets them in one of three ways. `all_gather` (Llama 3, arXiv 2407.21783): keys and values of the whole rows
are brought together. `ring` (arXiv 2310.01889): they go round, and each process adds what it sees of those
at hand to its result; so do their gradients. `ulysses` (arXiv 2309.14509): tokens are exchanged for heads,
and each process attends over whole rows with some of the heads.

Causal queries see more keys the later they stand. So for the first two a row is cut into 2 * degree pieces,
of which a process has one from the beginning and one from the end: all have the same number of pairs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ropewalk.layout import Layout
from ropewalk.model import ModelConfig, Transformer
from ropewalk.ops import AttentionLayout, RowPart, attention
from ropewalk.ops.attention_parts import (
    AttentionGradient,
    PartialAttention,
    Scores,
    Span,
    Tile,
    block_of,
    tiles,
)
from ropewalk.parallel.collectives import all_gather, exchanged, reduce_scatter, summed
from ropewalk.parallel.world import World

Work = Callable[[Tensor, int | None], Any]
"""What is done with keys and values `[2, B, S, kv_heads, D]` of a process, or (None) of the whole rows."""


def context_refusal(config: ModelConfig, layout: Layout) -> str | None:
    """Why this model's tokens cannot be shared so, and the nearest layout in which they can; or None."""
    if layout.context == 1 or layout.context_exchange != "ulysses":
        return None
    heads, needed = config.num_key_value_heads, layout.context * layout.tensor
    if heads % needed == 0:
        return None
    fewer = range(min(layout.context - 1, heads), 1, -1)
    fits = next((d for d in fewer if heads % (d * layout.tensor) == 0), 1)
    over = f" over parallel.tensor {layout.tensor}" if layout.tensor > 1 else ""
    return (
        f"ulysses shares out the key-value heads, and {layout.context} does not divide {heads}{over}; set "
        f"parallel.context: {fits}, or parallel.context_exchange: all_gather"
    )


def divide_rows(model: Transformer, world: World) -> None:
    """Lets `model` compute this process's tokens of packed rows, and reach the others' in attention.

    The layout is one that `context_refusal` has nothing against.
    """
    group, degree = world.group("context"), world.layout.context
    kind = EXCHANGES[world.layout.context_exchange]
    model.row_part = kind(group, world.index("context"), degree).part()


class Exchange(ABC):
    """This process among the `degree` of a context group."""

    def __init__(self, group: Any, index: int, degree: int) -> None:
        self.group, self.index, self.degree = group, index, degree

    def spans(self, index: int, length: int) -> list[Span]:
        """Which tokens of rows of `length` a process has, in the order in which it has them."""
        size = length // (2 * self.degree)
        last = 2 * self.degree - 1 - index
        return [(index * size, (index + 1) * size), (last * size, (last + 1) * size)]

    def columns(self, length: int) -> Tensor:
        """The same for this process, as indices. ValueError where rows cannot be cut so."""
        if length % (2 * self.degree):
            raise ValueError(f"rows of {length} tokens cannot be cut into {2 * self.degree} equal pieces")
        return torch.cat([torch.arange(*span) for span in self.spans(self.index, length)])

    def part(self) -> RowPart:
        return RowPart(self.columns, self.attention, lambda x: summed(x, self.group))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: AttentionLayout,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        prefix: None = None,
    ) -> Tensor:
        """`ops.attention` of this process's tokens; `layout` is that of the whole rows."""
        assert prefix is None
        scores = Scores(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
        return self.attend(q, k, v, layout, scores)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scores: Scores) -> Tensor:
        """What `attention` is, of scores that are described whole."""


class _ByKeys(Exchange):
    """Queries stay, keys and values come to them."""

    @abstractmethod
    def visit(self, kv: Tensor, work: Work) -> None:
        """Does `work` with everyone's keys and values `[2, B, S, kv_heads, D]`."""

    @abstractmethod
    def collect(self, kv: Tensor, work: Work) -> Tensor:
        """The same, where `work` gives their gradients: the sums of all processes' for these ones' `kv`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scores: Scores) -> Tensor:
        return _Attend.apply(q, k, v, self, layout, scores)

    def tiles(self, layout: AttentionLayout, q: Tensor, source: int | None, scores: Scores) -> list[Tile]:
        """What these queries see of a process's keys, or (None) of those of the whole rows."""
        length, block = q.shape[1] * self.degree, block_of(q, scores.softcap)
        key = (source, length, scores.window, block)
        if key not in layout.tiles:
            keys = [(0, length)] if source is None else self.spans(source, length)
            mine = self.spans(self.index, length)
            layout.tiles[key] = tiles(layout, length, mine, keys, scores.window, block)
        return layout.tiles[key]


class _Attend(torch.autograd.Function):
    """Keeps this process's tokens only; keys and values come once more for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: _ByKeys, layout: AttentionLayout, scores: Scores
    ) -> Tensor:
        partial = PartialAttention(q, scores)
        exchange.visit(
            torch.stack((k, v)), lambda kv, source: partial.add(kv, exchange.tiles(layout, q, source, scores))
        )
        out = partial.result()
        ctx.save_for_backward(q, k, v, out, partial.logsumexp)
        ctx.rest = exchange, layout, scores
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        exchange, layout, scores = ctx.rest
        gradient = AttentionGradient(q, out, logsumexp, grad, scores)
        dk, dv = exchange.collect(
            torch.stack((k, v)), lambda kv, source: gradient.of(kv, exchange.tiles(layout, q, source, scores))
        )
        return gradient.queries(), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class AllGather(_ByKeys):
    """Everyone gets all keys and values at once."""

    def visit(self, kv: Tensor, work: Work) -> None:
        work(self._whole(kv), None)

    def collect(self, kv: Tensor, work: Work) -> Tensor:
        size = kv.shape[2] // 2
        pieces = work(self._whole(kv), None).split(size, 2)
        parts = [torch.cat((pieces[i], pieces[-1 - i]), 2) for i in range(self.degree)]
        mine = torch.empty_like(parts[0])
        reduce_scatter(mine, torch.cat(parts), self.group)
        return mine

    def _whole(self, kv: Tensor) -> Tensor:
        found = kv.new_empty(self.degree * len(kv), *kv.shape[1:])
        all_gather(found, kv, self.group)
        heads, tails = found.unflatten(0, (self.degree, -1)).chunk(2, 3)
        return torch.cat([*heads, *tails.flip(0)], 2)


class Ring(_ByKeys):
    """Keys and values go from each process to the next while it computes with them; gradients follow."""

    def visit(self, kv: Tensor, work: Work) -> None:
        for step in range(self.degree):
            coming = self._pass_on(kv) if step < self.degree - 1 else None
            work(kv, (self.index - step) % self.degree)
            if coming is not None:
                kv = coming()

    def collect(self, kv: Tensor, work: Work) -> Tensor:
        arriving: Callable[[], Tensor] | None = None
        for step in range(self.degree):
            coming = self._pass_on(kv) if step < self.degree - 1 else None
            total = work(kv, (self.index - step) % self.degree)
            if arriving is not None:  # what those before have made of the same keys and values
                total += arriving()
            arriving = self._pass_on(total)
            if coming is not None:
                kv = coming()
        assert arriving is not None
        return arriving()

    def _pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins to send to the next process; what is returned waits for what the one before has sent."""
        found = torch.empty_like(x)
        to, source = (self.index + 1) % self.degree, (self.index - 1) % self.degree
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=to),
                dist.P2POp(dist.irecv, found, group=self.group, group_peer=source),
            ]
        )

        def ring_receive() -> Tensor:  # `Watchdog` knows it by this name
            for work in works:
                work.wait()
            assert x is not None  # it must live until it is sent
            return found

        return ring_receive


class Ulysses(Exchange):
    """All tokens of some heads for some tokens of all heads, and back."""

    def spans(self, index: int, length: int) -> list[Span]:
        size = length // self.degree
        return [(index * size, (index + 1) * size)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scores: Scores) -> Tensor:
        sizes = [t.shape[2] // self.degree for t in (q, k, v)]
        shared = torch.cat([t.unflatten(2, (self.degree, -1)) for t in (q, k, v)], 3)
        q, k, v = exchanged(shared.flatten(2, 3), self.to_heads, self.to_tokens).split(sizes, 2)
        window, softcap, scale = scores.window, scores.softcap, scores.scale
        out = attention(q, k, v, layout=layout, window=window, softcap=softcap, scale=scale)
        return exchanged(out, self.to_tokens, self.to_heads)

    def to_heads(self, x: Tensor) -> Tensor:
        """`[B, S / degree, heads, D]` -> `[B, S, heads / degree, D]`."""
        return torch.cat([*self._traded(x.chunk(self.degree, 2))], 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """`[B, S, heads / degree, D]` -> `[B, S / degree, heads, D]`."""
        return torch.cat([*self._traded(x.chunk(self.degree, 1))], 2)

    def _traded(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The i-th part goes to process i: what they all have sent here."""
        mine = torch.stack(parts)
        found = torch.empty_like(mine)
        dist.all_to_all_single(found, mine, group=self.group)
        return found


EXCHANGES: dict[str, type[Exchange]] = {"all_gather": AllGather, "ring": Ring, "ulysses": Ulysses}
