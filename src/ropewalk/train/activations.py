"""What a block's forward pass leaves for its backward pass, and how to keep less of it.

In: a Transformer. Out: the same one, whose `run_block` keeps, recomputes or moves away. Nothing that is
computed changes: gradients are the same to the last bit, but where long rows are cut into tiles.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ropewalk.model import Transformer
from ropewalk.model.layers import Context
from ropewalk.model.transformer import Block, RunBlock
from ropewalk.ops import QuantizedTensor
from ropewalk.train.host_memory import pinned

_TILE = 16384
"""Tokens that go through the MLP of a `full` block at once, in rows of more than twice as many."""
Mode = Literal["none", "full", "selective"]

_KEPT = frozenset(
    """
    ropewalk.product.default ropewalk.attention.default
    aten.mm.default aten.addmm.default aten.addmm_.default aten.bmm.default aten.baddbmm.default
    aten._scaled_dot_product_flash_attention.default aten._scaled_dot_product_efficient_attention.default
    aten._scaled_dot_product_cudnn_attention.default
    aten._scaled_dot_product_flash_attention_for_cpu.default torch_attn._varlen_attn.default
    """.split()
)
"""What `selective` keeps: results of matrix products and of attention. LoRA adds its part to a product in
place (addmm_): kept too, it is not added twice."""


def save_activations(
    model: Transformer,
    mode: Mode,
    *,
    every: int = 1,
    budget: float | None = None,
    offload: bool = False,
    randomness: bool = True,
) -> tuple[Mode, ...]:
    """Sets what each block of `model` does with its activations in training; returns the mode of each.

    `none` keeps all of them. `full` keeps the block's input and computes the rest again (arXiv 1604.06174);
    `selective` also keeps the results of matrix products and attention, so that only cheap operations are
    repeated (arXiv 2205.05198). `every` n: only each n-th block. `budget`: the share of all activations that
    may be kept; the modes are then chosen so that least is computed again. `offload` keeps the inputs of
    `full` blocks in the host's memory (on a CPU they are there). `randomness`: False where no block draws
    random numbers. Very long rows go through the MLPs of `full` blocks in tiles (see `_TILE`).
    """
    count = len(model.blocks)
    if budget is not None:
        modes = _within(budget, count, _kept_share(model))
    else:
        modes = tuple(mode if (index + 1) % every == 0 else "none" for index in range(count))
    runners: dict[str, RunBlock] = {
        "none": lambda block, hidden, context: block(hidden, context),
        "full": partial(_recompute, preserve_rng_state=randomness),
        "selective": partial(_recompute, preserve_rng_state=randomness, context_fn=_selective),
    }
    device = model.embed.weight.device
    if offload and device.type != "cpu":
        runners["full"] = Offload(device, randomness).run

    def run(block: Block, hidden: Tensor, context: Context) -> Any:
        return runners[modes[block.attention.index]](block, hidden, context)

    for block, mode in zip(model.blocks, modes, strict=True):
        assert isinstance(block, Block)
        block.tile, block.recomputed = _TILE if mode == "full" else None, mode != "none"
    model.run_block = run if set(modes) != {"none"} else None
    return modes


def _recompute(block: Block, hidden: Tensor, context: Context, **options: Any) -> Any:
    return checkpoint(block, hidden, context, use_reentrant=False, **options)


def _selective() -> Any:
    def policy(_: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        kept = str(operation) in _KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    # the entry that addmm_ changes is the very one that is kept for addmm_ itself
    return create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)


def _within(budget: float, count: int, selective: float) -> tuple[Mode, ...]:
    """Modes of `count` equal blocks that keep at most `budget` of the activations, and recompute least.

    `selective` blocks keep that share at almost no cost, so that they come first; `full` ones keep nothing to
    speak of. The costlier mode of a mixture is spread evenly.
    """
    if selective <= budget:
        cheap, dear, share = "none", "selective", (1 - budget) / (1 - selective) if selective < 1 else 0.0
    else:
        cheap, dear, share = "selective", "full", 1 - budget / selective
    chosen = -(-round(count * share * 1e6) // 10**6)  # rounded up, but not for the last bit of a float
    marks = [(index + 1) * chosen // count - index * chosen // count for index in range(count)]
    return tuple(dear if mark else cheap for mark in marks)  # type: ignore[misc]


def _kept_share(model: Transformer) -> float:
    """Of what a block keeps, the share that `selective` keeps: of what 64 tokens more add, for some of it
    (DoRA's) does not grow with them."""
    few, many = (_kept_bytes(model, tokens) for tokens in (64, 128))
    everything, products = (more - less for more, less in zip(many, few, strict=True))
    return min(1.0, products / everything) if everything else 1.0


def _kept_bytes(model: Transformer, tokens: int) -> tuple[int, int]:
    """Of all that a block keeps for its backward pass, and of what `selective` keeps."""
    block, config = model.blocks[0], model.config
    plain = [p for p in model.parameters() if not isinstance(p, QuantizedTensor)]
    parameters = {p.untyped_storage().data_ptr() for p in plain}
    seen: tuple[dict[int, int], dict[int, int]] = {}, {}

    def count(kind: int, tensor: Tensor) -> Tensor:
        if isinstance(tensor, QuantizedTensor):  # a weight
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[kind][storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    alive: list[Tensor] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if str(func) in _KEPT:
                for part in out if isinstance(out, tuple) else (out,):
                    if isinstance(part, Tensor):
                        count(1, part)
            return out

    like = model.embed.weight
    hidden = torch.zeros(1, tokens, config.hidden_size, device=like.device, dtype=like.dtype)
    captured: list[Context] = []

    def catch(_: Block, hidden: Tensor, context: Context) -> tuple[Tensor, None]:
        captured.append(context)
        return hidden, None

    before, training = model.run_block, model.training
    model.run_block = catch
    model.train()(torch.zeros(1, tokens, dtype=torch.long, device=hidden.device))
    model.run_block = before
    with torch.autograd.graph.saved_tensors_hooks(partial(count, 0), lambda x: x), Products():
        block(hidden.requires_grad_(), captured[0])
    model.train(training)
    return sum(seen[0].values()), sum(seen[1].values())


class Offload:
    """Inputs of recomputed blocks in host memory; copies run beside the computation.

    Going forward, a block's input is copied while the next block computes, and let go when its copy is done:
    at most two wait. Going backward, the next input is fetched while this block is recomputed.
    """

    def __init__(self, device: torch.device, randomness: bool = True) -> None:
        self.device, self.randomness = device, randomness
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copies: list[_HostCopy] = []
        self.leaving: deque[tuple[Tensor, Any]] = deque()
        self.spare: list[Tensor] = []
        """host memory in bytes that is not in use: pinning it takes longer than filling it"""

    def room(self, size: int) -> Tensor:
        """At least `size` bytes of host memory, whose last use came before on the copying stream."""
        self.spare.sort(key=len)
        for place, room in enumerate(self.spare):
            if len(room) >= size:
                return self.spare.pop(place)
        del self.spare[-1:]  # too small: what comes takes its place
        return torch.empty(size, dtype=torch.uint8) if self.stream is None else pinned(size)

    def run(self, block: Block, hidden: Tensor, context: Context) -> Any:
        copy = _HostCopy(self, hidden)

        def forward() -> Any:
            return block(copy.take(), context)

        return checkpoint(forward, use_reentrant=False, preserve_rng_state=self.randomness)

    def beside(self, work: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        """The result of `work` on the copying stream, and the event of its end (None without streams)."""
        if self.stream is None:
            return work(), None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = work()
            return result, self.stream.record_event()


class _HostCopy:
    """A block's input: handed out once as it is, later from its copy in host memory."""

    def __init__(self, owner: Offload, hidden: Tensor) -> None:
        self.owner = owner
        self.hidden: Tensor | None = hidden
        self.fetched: tuple[Tensor, Any] | None = None
        self.needs = hidden.requires_grad
        """as it was: of what needs no gradient a block keeps less, and must when it runs again"""
        value = hidden.detach()
        self.room = owner.room(value.nbytes)
        self.host = self.room[: value.nbytes].view(value.dtype).view(value.shape)
        _, self.saved = owner.beside(lambda: self.host.copy_(value, non_blocking=True))
        owner.leaving.append((value, self.saved))
        while len(owner.leaving) > 2:
            _, event = owner.leaving.popleft()
            if event is not None:
                torch.cuda.current_stream(owner.device).wait_event(event)
        owner.copies.append(self)

    def fetch(self) -> None:
        if self.fetched is None:
            if self.saved is not None:
                self.saved.synchronize()
            self.fetched = self.owner.beside(
                lambda: self.host.to(self.owner.device, non_blocking=True, copy=True)
            )

    def take(self) -> Tensor:
        if self.hidden is not None:
            hidden, self.hidden = self.hidden, None
            return hidden
        self.owner.leaving.clear()
        self.fetch()
        place = self.owner.copies.index(self)
        self.owner.spare += [copy.room for copy in self.owner.copies[place:]]
        del self.owner.copies[place:]
        if self.owner.copies:
            self.owner.copies[-1].fetch()
        assert self.fetched is not None
        (value, event), self.fetched = self.fetched, None
        if event is not None:
            stream = torch.cuda.current_stream(self.owner.device)
            stream.wait_event(event)
            value.record_stream(stream)
        return value.requires_grad_(self.needs)
