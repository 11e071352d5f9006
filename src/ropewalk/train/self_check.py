"""Before the first step: what will be trained, computed as it will be computed, against the plain formulas.

On documents of the run's own first batch, three forward and backward passes:

- as in training: packed in one row, with the fused operations, recomputation and adapters that the run uses;
- by the references of `ropewalk.ops`: explicit masks, all logits, autograd's own gradients;
- each document alone in a row, in two micro-batches whose gradients add up.

Losses, gradients and the results of every module must agree. No second set of gradients is ever held: each
one is folded into a few thousand sums as soon as it is there, and a wrong value anywhere changes one of them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropewalk.data import Batch
from ropewalk.errors import RopewalkError
from ropewalk.model import Transformer
from ropewalk.ops import references
from ropewalk.train.objective import loss_sum

LEAST, MOST = 32, 512
"""Tokens that are checked."""
LOGITS = 16 << 20
"""Most logits: the plain formulas hold [tokens, vocabulary] in float32, several times over."""
_BUCKETS = 4096
_WHOLE = 16
"""Rows and columns hold a multiple of so many tokens: float8's products want it."""


@dataclass(frozen=True)
class Bounds:
    """Largest differences allowed, relative to the reference's own size.

    Thirty layers of bfloat16 were seen to move gradients of few tokens by 9%; a wrong mask or a lost term
    moves them by half and more.
    """

    loss: float
    gradient: float
    """of all gradients together"""
    one: float
    """of the gradient of one parameter, and of what one module adds to the difference"""


BOUNDS = {
    torch.float32: Bounds(loss=1e-5, gradient=1e-3, one=1e-2),
    torch.bfloat16: Bounds(loss=3e-2, gradient=0.25, one=0.5),
    torch.float64: Bounds(loss=1e-10, gradient=1e-8, one=1e-6),
}


def bounds_of(model: Transformer) -> Bounds:
    """By the model's dtype. Where a router rounds differently, a token goes to another expert: no error.

    float8's products round inputs to 3 bits of mantissa, and so enlarge a difference in the last bit: 16
    layers, compiled and not, were seen to give gradients 30% apart with losses that agree in 4 digits.
    """
    bounds = BOUNDS[model.embed.weight.dtype]
    if any(type(module).__name__ == "Float8Linear" for module in model.blocks.modules()):
        bounds = replace(bounds, gradient=0.6, one=1.2)
    if model.config.moe_layers and model.embed.weight.dtype == torch.bfloat16:
        return replace(bounds, loss=0.1, gradient=0.75, one=float("inf"))
    return bounds


@dataclass
class Pass:
    """What one way to compute gave, in folds."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(input, output) of each module, in the order in which they were done"""


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, and the largest differences found."""

    tokens: int
    documents: int
    difference: float
    """of all gradients together, relative to their norm"""
    allowed: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"self-check: fused = reference, packed = alone, accumulated = one batch (gradients of "
            f"{self.tokens} tokens in {self.documents} documents differ by {self.difference:.1e}, "
            f"allowed {self.allowed:g}; {self.seconds:.1f} s)"
        )


def self_check(model: Transformer, batch: Batch, *, chunk: int, tokens: int) -> SelfCheck | None:
    """Compares the three passes on about `tokens` tokens of `batch`. The model is left as it was.

    Raises RopewalkError, naming the first module that differs, where a difference is beyond what the model's
    dtype explains. None where the loss itself is not finite. Must come before the optimizer, which takes
    gradients away.
    """
    began = time.perf_counter()
    most = min(MOST, LOGITS // model.config.vocab_size)
    packed = sample(batch, max(LEAST, min(most, tokens)))
    alone = unpacked(packed)
    half = (len(alone.tokens) + 1) // 2
    parts = [part for part in (alone.rows(0, half), alone.rows(half, len(alone.tokens))) if len(part.tokens)]
    with _ready(model):
        fused = _measure(model, [packed], chunk, modules=True)
        single = _measure(model, parts, chunk)
        with _plainly(model):
            plain = _measure(model, [packed], chunk, modules=True)
    if not math.isfinite(plain.loss):
        return None  # the first step will say which documents and weights are to blame
    bounds = bounds_of(model)
    worst = max(
        _compare(fused, plain, "the plain formulas", bounds),
        _compare(single, fused, "the same documents packed in one row", bounds),
    )
    seconds = time.perf_counter() - began
    return SelfCheck(packed.tokens.numel(), len(alone.tokens), worst, bounds.gradient, seconds)


def check_compiled(model: Transformer, batch: Batch, *, chunk: int, compare: bool = True) -> float:
    """Compiles the blocks on a micro-batch of the shape of training; the seconds beyond a second such pass.

    With `compare` its loss and gradients must be those of the blocks as written: else RopewalkError.
    """
    with _ready(model, compiled=True):
        began = time.perf_counter()
        _measure(model, [batch], chunk)
        between = time.perf_counter()
        compiled = _measure(model, [batch], chunk)
        seconds = 2 * between - began - time.perf_counter()
    if compare:
        with _ready(model), _recomputed(model, nullcontext):
            eager = _measure(model, [batch], chunk)
        _compare(compiled, eager, "the blocks before compilation", bounds_of(model))
    return max(0.0, seconds)


def sample(batch: Batch, limit: int) -> Batch:
    """One packed row `[1, <= limit]`: documents of the batch, none longer than half of it.

    Documents with scored tokens come first; where there are none, every token is scored.
    """
    limit -= limit % _WHOLE
    found: list[tuple[int, Tensor, bool]] = []
    for row in range(len(batch.tokens)):
        numbers = batch.segments[row]
        for number in range(int(numbers.max()) + 1):
            document = (numbers == number).nonzero().flatten()[: limit // 2]
            found.append((row, document, bool((batch.labels[row, document] != -100).any())))
    found.sort(key=lambda item: not item[2])
    parts: list[tuple[Tensor, ...]] = []
    used = 0
    for number, (row, place, _) in enumerate(found):
        place = place[: limit - used]
        segment = torch.full_like(place, number)
        parts.append(
            (batch.tokens[row, place], batch.labels[row, place], batch.positions[row, place], segment)
        )
        used += len(place)
        if used >= limit:
            break
    whole = used - used % _WHOLE or used
    columns = [torch.cat(some)[None, :whole] for some in zip(*parts, strict=True)]
    tokens, labels, positions, segments = columns
    if not bool((labels != -100).any()):
        labels = torch.roll(tokens, -1, 1)
    return Batch(tokens, labels, positions, segments)


def unpacked(packed: Batch) -> Batch:
    """The documents of a packed row, each in a row of its own, padded at the end."""
    lengths = torch.bincount(packed.segments[0]).tolist()
    rows = [torch.split(getattr(packed, name)[0], lengths) for name in ("tokens", "labels", "positions")]
    width = -(-max(lengths) // _WHOLE) * _WHOLE
    tokens, labels, positions = (
        torch.stack(
            [nn.functional.pad(document, (0, width - len(document)), value=value) for document in row]
        )
        for row, value in zip(rows, (0, -100, 0), strict=True)
    )
    segments = torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], 0, -1)
    return Batch(tokens, labels, positions, segments)


def fold(tensor: Tensor) -> Tensor:
    """At most 4,096 float32 (float64 for float64) sums, in which each value of a tensor counts once."""
    flat = tensor.detach().flatten()
    whole = len(flat) // _BUCKETS * _BUCKETS
    wide = torch.promote_types(flat.dtype, torch.float32)
    if not whole:
        return flat.to(wide)
    folded = flat[:whole].view(-1, _BUCKETS).sum(0, dtype=wide)
    folded[: len(flat) - whole] += flat[whole:]
    return folded


def _measure(model: Transformer, parts: list[Batch], chunk: int, modules: bool = False) -> Pass:
    """Mean loss and folded gradients over micro-batches; where asked, the folded results of every module."""
    found = Pass()
    handles = _watch_gradients(model, found) + (_watch_modules(model, found) if modules else [])
    scored = sum(int((part.labels != -100).sum()) for part in parts)
    try:
        for part in parts:
            loss = loss_sum(model, part, chunk) / scored
            if loss.requires_grad:
                loss.backward()
            found.loss += loss.item()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watch_gradients(model: nn.Module, found: Pass) -> list[Any]:
    """Hooks that add each finished gradient to `found`, folded, and free it."""

    def watch(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            folded = fold(parameter.grad)
            parameter.grad = None
            known = found.gradients.get(name)
            found.gradients[name] = folded if known is None else known.add_(folded)

        return hook

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p.register_post_accumulate_grad_hook(watch(name)) for name, p in trained]


def _watch_modules(model: nn.Module, found: Pass) -> list[Any]:
    """Hooks that fold what goes in and out of each module, the first time (not when it is recomputed)."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if name not in found.modules and inputs and isinstance(value, Tensor):
                given = inputs[0].detach() if isinstance(inputs[0], Tensor) else value
                found.modules[name] = fold(given), fold(value)

        return hook

    return [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]


@contextmanager
def _ready(model: Transformer, compiled: bool = False) -> Iterator[None]:
    """In training mode without randomness, blocks as written, and no trained weight all zero.

    (A LoRA matrix B that is zero hides its A.) All of it is put back.
    """
    training = model.training
    drops: list[tuple[Any, Any]] = [
        (m, m.dropout) for m in model.modules() if isinstance(getattr(m, "dropout", None), float)
    ]
    zero = [p for p in model.parameters() if p.requires_grad and not bool(p.any())]
    generator = torch.Generator().manual_seed(0)
    for module, _ in drops:
        module.dropout = 0.0
    for parameter in zero:
        drawn = torch.empty(parameter.shape).normal_(0.0, 0.01, generator=generator)
        parameter.data.copy_(drawn)
    was_compiled = any(block._compiled_call_impl is not None for block in model.blocks)
    eager = torch.compiler.set_stance("force_eager") if was_compiled and not compiled else nullcontext()
    try:
        with eager:
            model.train()
            yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        for module, dropout in drops:
            module.dropout = dropout
        for parameter in zero:
            parameter.data.zero_()


@contextmanager
def _plainly(model: Transformer) -> Iterator[None]:
    """The operations' references."""
    with references(), _recomputed(model, references):
        yield


@contextmanager
def _recomputed(model: Transformer, way: Callable[[], Any]) -> Iterator[None]:
    """Blocks are recomputed, each time in this context: plain products with a 4-bit weight keep it in 16, and
    blocks as written keep more than compiled ones, for which there may be no room."""

    def run(block: nn.Module, hidden: Tensor, context: Any) -> Any:
        def again(hidden: Tensor) -> Any:
            with way():  # once more, because a GPU's backward pass has its own thread
                return block(hidden, context)

        return checkpoint(again, hidden, use_reentrant=False)

    before, model.run_block = model.run_block, run
    try:
        yield
    finally:
        model.run_block = before


def _compare(mine: Pass, other: Pass, what: str, bounds: Bounds) -> float:
    """The difference of all gradients together; RopewalkError where something is beyond its bound."""
    loss = abs(mine.loss - other.loss) / max(abs(other.loss), 1e-6)
    whole = _norm(other.gradients.values())
    empty = torch.zeros(())
    differences = {
        name: float((mine.gradients.get(name, empty) - folded).norm())
        for name, folded in other.gradients.items()
    }
    if not whole:
        differences = {}
    total = math.hypot(*differences.values()) / (whole or 1.0)
    # what is small beside the rest (the bias of keys has no gradient but rounding) need not agree with itself
    single = {
        name: difference / (float(other.gradients[name].norm()) + 0.03 * whole)
        for name, difference in differences.items()
    }
    worst = max(single, key=lambda name: single[name], default="")
    if loss <= bounds.loss and total <= bounds.gradient and (not worst or single[worst] <= bounds.one):
        return total
    where = _first_different(mine, other, bounds.one) or f"the gradient of {worst}"
    raise RopewalkError(
        f"self-check: training would not compute what {what} give: loss {mine.loss:.6g} against "
        f"{other.loss:.6g}, gradients {total:.2g} apart (allowed: {bounds.gradient:g}); it begins in "
        f"{where}. Nothing was trained. Please report it with `ropewalk doctor` and the recipe; "
        "train.self_check: false leaves the check out"
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in tensors))


def _first_different(mine: Pass, other: Pass, bound: float) -> str | None:
    """The first module whose inputs agree and whose results do not."""

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm().clamp(min=1e-12))

    for name, (given, result) in mine.modules.items():
        theirs = other.modules.get(name)
        if theirs is not None and not apart(result, theirs[1]) <= bound and apart(given, theirs[0]) <= bound:
            return f"the module {name}"
    return None
