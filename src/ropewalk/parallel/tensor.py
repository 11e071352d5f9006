"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198).

A block's matrices come in pairs. Of the first (q, k, v; gate and up) each process has some columns of the
transposed weight: some heads, some inner channels. Of the second (o; down) it has the rows that belong to
them. So a pair needs one exchange where the hidden states enter it and one where they leave it. Between the
pairs each process keeps some tokens of each row only; these it gives to whole experts, where an MLP is a
mixture. Of what enters a pair, too, it keeps only these for the backward pass, where all are gathered again.
The vocabulary of embedding and head is divided, too.

A process has plain tensors, its slices, under the names of the whole ones: every operation, adapter and
optimizer works on them as on a smaller model's. (With DTensor parameters none of our own operations would.)
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropewalk.errors import RopewalkError
from ropewalk.model import Transformer
from ropewalk.model.moe import MixtureOfExperts, RouterStatistics
from ropewalk.ops import QuantizedTensor, VocabularyPart
from ropewalk.ops.embedding import embedding
from ropewalk.parallel.collectives import all_gather, exchanged, reduce_scatter, summed
from ropewalk.parallel.sharding import replace
from ropewalk.parallel.slices import sliced_along
from ropewalk.parallel.world import World


def divide(model: Transformer, world: World) -> None:
    """Leaves each process its slices of `model`, in place, and lets it exchange hidden states.

    The degree is one that `slices.refusal` has nothing against.
    """
    degree = world.layout.tensor
    assert world.mesh is not None
    group = world.group("tensor")
    index = dist.get_rank(group)
    for name, parameter in list(model.named_parameters()):
        dim = sliced_along(name)
        if dim is not None:
            piece = _piece(parameter, dim, index, degree)
            replace(model, name, nn.Parameter(piece, requires_grad=parameter.requires_grad))
    model.tie_head()
    _connect(model, _Exchange(group, index, degree))


def _piece(parameter: Tensor, dim: int, index: int, degree: int) -> Tensor:
    size = parameter.shape[dim] // degree
    data = parameter.detach()
    if isinstance(data, QuantizedTensor):
        rows = data[index * size : (index + 1) * size] if dim == 0 else None
        return data.columns(index * size, size) if rows is None else rows.clone()
    return data.narrow(dim, index * size, size).clone(memory_format=torch.contiguous_format)


class _Exchange:
    """What the processes of a group send each other. `apart`: between pairs, each has some of the tokens."""

    def __init__(self, group: Any, index: int, degree: int) -> None:
        self.group, self.index, self.degree = group, index, degree
        self.apart = False

    def enter(self, x: Tensor) -> Tensor:
        """Hidden states for a first matrix: all tokens `[B, S, H]`, of some where they are apart."""
        if not torch.is_grad_enabled():
            return x
        if self.apart:
            return exchanged(x, self.gathered, self.scattered)
        return exchanged(x, lambda x: x.view_as(x), self.summed)

    def leave(self, x: Tensor, entered: "_Own | None" = None) -> Tensor:
        """The sum of what the second matrices' parts gave: for all tokens, or for this process's. Its
        gradient's coming begins the gathering of what `entered` the pair."""
        if not self.apart:
            return self.summed(x)
        kept = None if entered is None else weakref.ref(entered)

        def back(gradient: Tensor) -> Tensor:
            whole = self.gathered(gradient)
            if kept is not None and (own := kept()) is not None:
                own.begin()
            return whole

        return exchanged(x, self.scattered, back)

    def split(self, x: Tensor) -> Tensor:
        """Of all tokens, which every process has, this one's."""
        return exchanged(x, self.own, self.gathered)

    def summed(self, x: Tensor) -> Tensor:
        return summed(x, self.group)

    def gathered(self, x: Tensor) -> Tensor:
        """`[B, S / degree, H]` of each -> `[B, S, H]`."""
        return self.gathering(x)()

    def gathering(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins it; what is returned waits for the result."""
        alone = x.shape[0] == 1  # nothing to turn; and fully_shard warns of a model whose result is a view
        mine = x[0].contiguous() if alone else x.transpose(0, 1).contiguous()
        shape = self.degree * mine.shape[0], *mine.shape[1:]
        whole = mine.new_empty(1, *shape) if alone else mine.new_empty(shape)
        work = all_gather(whole[0] if alone else whole, mine, self.group, wait=False)

        def gathering_wait() -> Tensor:  # `Watchdog` knows it by this name
            work.wait()
            return whole if alone else whole.transpose(0, 1).contiguous()

        return gathering_wait

    def scattered(self, x: Tensor) -> Tensor:
        """`[B, S, H]` of each -> their sum for this one's tokens, `[B, S / degree, H]`."""
        rows = x.transpose(0, 1).contiguous()
        out = rows.new_empty(rows.shape[0] // self.degree, *rows.shape[1:])
        reduce_scatter(out, rows, self.group)
        return out.transpose(0, 1).contiguous()

    def own(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[B, S / degree, ...]`."""
        size = x.shape[1] // self.degree
        return x[:, self.index * size : (self.index + 1) * size].contiguous()


class _Own:
    """This process's tokens of what entered a pair, and all of them while its backward pass reads them."""

    def __init__(self, exchange: _Exchange, own: Tensor) -> None:
        self.exchange, self.own = exchange, own
        self.readers = self.left = 0
        self.coming: Callable[[], Tensor] | None = None
        self.whole: Tensor | None = None

    def begin(self) -> None:
        if self.coming is None and self.whole is None:
            self.coming = self.exchange.gathering(self.own)

    def read(self) -> Tensor:
        self.begin()
        if self.coming is not None:
            self.whole, self.coming, self.left = self.coming(), None, self.readers
        whole, self.left = self.whole, self.left - 1
        assert whole is not None
        if not self.left:
            self.whole = None
        return whole


@contextmanager
def _kept_apart(own: _Own, whole: Tensor) -> Iterator[None]:
    """Whatever keeps `whole` for the backward pass keeps `own` (arXiv 2205.05198, 4.2.2). The processes read
    in the same order, as their graphs are the same."""
    kept = [own]
    numbers, place = whole.numel(), whole.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.numel() != numbers:
            return tensor
        if tensor.untyped_storage().data_ptr() != place:
            return tensor
        kept[0].readers += 1
        return kept[0], tensor.shape

    def unpack(found: Any) -> Tensor:
        return found if isinstance(found, Tensor) else found[0].read().view(found[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    kept.clear()  # whatever was kept refers to these functions


def _connect(model: Transformer, exchange: _Exchange) -> None:
    """Hooks where hidden states enter and leave the pairs; embedding, loss and logits over the vocabulary."""

    def begin(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        training = model.training and torch.is_grad_enabled()
        exchange.apart = training
        if training and inputs[0].shape[1] % exchange.degree:
            raise RopewalkError(f"rows of {inputs[0].shape[1]} tokens cannot be shared by {exchange.degree}")

    def first(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (exchange.split(inputs[0]) if exchange.apart else inputs[0], *inputs[1:])

    def shared(block: nn.Module, pair: nn.Module, last: nn.Module) -> Callable[..., Tensor]:
        forward = pair.forward

        def run(x: Tensor, *others: Any) -> Tensor:
            whole = exchange.enter(x)
            if exchange.apart and not block.recomputed:  # what runs again gathers them there
                own = _Own(exchange, x.detach())
                with _kept_apart(own, whole):
                    output = exchange.leave(forward(whole, *others), own)
            else:
                output = exchange.leave(forward(whole, *others))
            bias = _bias(last)
            # every process has added it
            return output if bias is None else output - (exchange.degree - 1) * bias.detach()

        return run

    model.register_forward_pre_hook(begin)
    next(model.blocks.children()).register_forward_pre_hook(first)

    def routed(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, real = inputs
        if exchange.apart and real is not None:
            real = exchange.own(real.view(hidden.shape[0], -1)).flatten()
        return hidden, real

    def counted(_: nn.Module, __: Any, output: tuple[Tensor, RouterStatistics]) -> Any:
        hidden, statistics = output
        if not exchange.apart:
            return output
        sums = exchange.summed(torch.stack(statistics))
        return hidden, (sums[0].clone(), sums[1].clone())  # fully_shard warns of results that are views

    for block in model.blocks.children():
        pairs = [("attention", "o_proj"), ("mlp", "down_proj")]
        if isinstance(block.mlp, MixtureOfExperts):  # a process's own tokens, and experts that are not sliced
            block.mlp.register_forward_pre_hook(routed)
            block.mlp.register_forward_hook(counted)
            pairs.pop()
        for name, last in pairs:
            pair = block.get_submodule(name)
            pair.forward = shared(block, pair, pair.get_submodule(last))
    model.norm.register_forward_hook(lambda _, __, output: exchange.enter(output))

    rows = model.config.vocab_size // exchange.degree
    start = exchange.index * rows

    def embed(tokens: Tensor) -> Tensor:
        here = tokens - start
        inside = (here >= 0) & (here < rows)
        found = embedding(here.clamp(0, rows - 1), model.embed.weight)
        return exchange.summed(found * inside.unsqueeze(-1))

    def logits(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        parts = [torch.empty_like(output) for _ in range(exchange.degree)]
        dist.all_gather(parts, output.detach().contiguous(), group=exchange.group)
        return torch.cat(parts, -1)

    def largest(x: Tensor) -> Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=exchange.group)
        return x

    model.embed.forward = embed  # type: ignore[method-assign,assignment]
    model.head.register_forward_hook(logits)  # generation only: the loss has the part of the head itself
    model.vocabulary = VocabularyPart(start, model.config.vocab_size, exchange.summed, largest)


def _bias(module: nn.Module) -> Tensor | None:
    """Of a linear layer, or of the one that an adapter is beside."""
    bias = getattr(getattr(module, "base", module), "bias", None)
    return bias.to_local() if isinstance(bias, DTensor) else bias
