"""The update rules: AdamW, Lion, Muon and Adafactor over slots whose gradients are there.

Each makes a slot's state at its first update, and takes it on. AdamW calls torch's fused kernel, not
torch.optim.AdamW, which imports torch.compile's machinery: 2.5 s and 73 MB. On a GPU it has a kernel of its
own for what torch's cannot take as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ropewalk.ops.native import has_triton
from ropewalk.train.optim_lowbit import LowBitState
from ropewalk.train.optim_slot import Slot, batches, full, gradients, pieces, show


@dataclass(frozen=True)
class Update:
    """The numbers of one update of some slots."""

    rate: float
    decay: float
    """decoupled weight decay (arXiv 1711.05101): weights shrink by rate x decay"""
    betas: tuple[float, float]
    epsilon: float
    scale: float
    """what gradients are multiplied by first"""
    seed: int


Tensors = list[Tensor]
Rule = Callable[[list[Slot], Update], None]
MOMENTS: dict[str, dict[str, bool]] = {
    "adamw": {"exp_avg": True, "exp_avg_sq": False},
    "lion": {"exp_avg": True},
    "muon": {"momentum": True},
    "adafactor": {},
}
"""What a rule keeps for each number of a weight, and whether that can be negative. (Adafactor has a row and
a column.)"""


def adamw(slots: list[Slot], update: Update) -> None:
    """arXiv 1711.05101, algorithm 2."""

    def kernel(weights: Tensors, gradients: Tensors, states: list[Tensors], steps: Tensors) -> None:
        torch._fused_adamw_(
            weights,
            gradients,
            states[0],
            states[1],
            [],
            steps,
            lr=update.rate,
            beta1=update.betas[0],
            beta2=update.betas[1],
            weight_decay=update.decay,
            eps=update.epsilon,
            amsgrad=False,
            maximize=False,
        )

    rest = []
    for slot in slots:
        if not _has_kernel(slot):
            rest.append(slot)
            continue
        from ropewalk.train.optim_kernel import update_slot

        slot.count += 1
        update_slot(slot, update)
        slot.gradient = None
    _elementwise(rest, update, ("exp_avg", "exp_avg_sq"), kernel)


_KERNEL_DEVICES = {"cuda"}
"""device types where AdamW has a kernel for what otherwise is done in pieces; tests add the CPU"""


def _has_kernel(slot: Slot) -> bool:
    """For what would take a dozen passes: bfloat16 weights, and states in 8 bits. (Not on the host.)"""
    low = [state for state in slot.state.values() if isinstance(state, LowBitState)]
    worth = slot.weight.dtype == torch.bfloat16 or bool(low)
    fits = slot.weight.dtype in (torch.float32, torch.bfloat16) and slot.parameter.numel() > 0
    here = slot.host is None and slot.weight.device.type in _KERNEL_DEVICES
    return here and fits and worth and all(state.bits == 8 for state in low) and has_triton()


def lion(slots: list[Slot], update: Update) -> None:
    """arXiv 2302.06675, algorithm 2: the sign of an average, so each weight moves by the same length."""
    beta1, beta2 = update.betas

    def kernel(weights: Tensors, gradients: Tensors, states: list[Tensors], steps: Tensors) -> None:
        directions = torch._foreach_lerp(states[0], gradients, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(weights, 1 - update.rate * update.decay)
        torch._foreach_add_(weights, directions, alpha=-update.rate)
        torch._foreach_lerp_(states[0], gradients, 1 - beta2)

    _elementwise(slots, update, ("exp_avg",), kernel)


def _elementwise(
    slots: list[Slot], update: Update, kinds: tuple[str, ...], kernel: Callable[..., None]
) -> None:
    """Runs `kernel(weights, gradients, states by kind, steps)`, which works in place on lists of pieces."""
    steps = {}
    for slot in slots:
        slot.count += 1
        steps[slot.count] = torch.full((), float(slot.count), device=slot.weight.device)
    for batch in batches(slots):
        weights = [piece.weight() for piece in batch]
        slopes = gradients(batch)
        if update.scale != 1.0:
            torch._foreach_mul_(slopes, update.scale)  # in place: they are used this once
        states = [[piece.state(kind) for piece in batch] for kind in kinds]
        kernel(weights, slopes, states, [steps[piece.slot.count] for piece in batch])
        for i, piece in enumerate(batch):
            for kind, numbers in zip(kinds, states, strict=True):
                piece.keep(kind, numbers[i])
            piece.round(weights[i], update.seed)
            if piece.stop == piece.slot.parameter.numel():
                piece.slot.gradient = None
        show(batch)


def muon(slots: list[Slot], update: Update) -> None:
    """Momentum made orthogonal (https://kellerjordan.github.io/posts/muon), for matrices.

    Scaled to the length of AdamW's usual updates, 0.2 per weight (arXiv 2502.16982), so that AdamW's learning
    rate and weight decay serve both: torch.optim.Muon(adjust_lr_fn="match_rms_adamw"). Momentum is betas[0],
    Nesterov's. Needs a float32 and a few bfloat16 copies of the one matrix at hand.
    """
    momentum = update.betas[0]
    for slot in slots:
        slot.count += 1
        assert slot.gradient is not None
        gradient, slot.gradient = full(slot.gradient) * update.scale, None
        average = slot.state["momentum"]
        assert isinstance(average, Tensor)
        average.lerp_(gradient, 1 - momentum)
        direction = orthogonal(gradient.lerp_(average, momentum)).contiguous()
        rate = update.rate * 0.2 * math.sqrt(max(direction.shape))
        for piece in pieces(slot):
            weight = piece.weight().mul_(1 - update.rate * update.decay)
            piece.store(weight.add_(piece.of(direction), alpha=-rate), update.seed)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix, bfloat16: singular values come to lie in 0.7 to 1.2.

    Five steps of Newton and Schulz's iteration, its polynomial chosen to lift small values fast (Jordan's).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def adafactor(slots: list[Slot], update: Update) -> None:
    """arXiv 1804.04235, algorithm 4, with the learning rate as given instead of one relative to the weights.

    The second moment of a matrix is the product of its means by row and by column; no first moment; the root
    mean square of the update is at most 1. As transformers.Adafactor(scale_parameter=False,
    relative_step=False). Tensors of more dimensions are taken as matrices with their last one as columns.
    """
    for slot in slots:
        slot.count += 1
        decay = 1 - slot.count**-0.8
        if "row" in slot.state:
            inverse_root = _factored(slot, update.scale, decay)
        else:
            inverse_root = _unfactored(slot, update.scale, decay)
        columns = slot.parameter.shape[-1] if slot.parameter.ndim else 1
        squares = [
            (piece.gradient(update.scale) * inverse_root(piece.start, piece.stop)).square().sum()
            for piece in pieces(slot, columns)
        ]
        length = (torch.stack(squares).sum() / slot.parameter.numel()).sqrt().clamp(min=1.0)
        for piece in pieces(slot, columns):
            direction = piece.gradient(update.scale) * inverse_root(piece.start, piece.stop) / length
            weight = piece.weight().mul_(1 - update.rate * update.decay)
            piece.store(weight.sub_(direction, alpha=update.rate), update.seed)
        slot.gradient = None


InverseRoot = Callable[[int, int], Tensor]
"""1 / root of the second moment, flat, of the numbers from start to stop"""


def _factored(slot: Slot, scale: float, decay: float) -> InverseRoot:
    row, column = slot.state["row"], slot.state["column"]
    assert isinstance(row, Tensor)
    assert isinstance(column, Tensor)
    columns, sums = len(column), torch.zeros_like(column)
    for piece in pieces(slot, columns):
        squares = piece.gradient(scale).square().add_(1e-30).view(-1, columns)
        row[piece.start // columns : piece.stop // columns].lerp_(squares.mean(1), 1 - decay)
        sums += squares.sum(0)
    column.lerp_(sums / len(row), 1 - decay)
    by_row, by_column = (row / row.mean()).rsqrt(), column.rsqrt()

    def inverse_root(start: int, stop: int) -> Tensor:
        return (by_row[start // columns : stop // columns, None] * by_column).view(-1)

    return inverse_root


def _unfactored(slot: Slot, scale: float, decay: float) -> InverseRoot:
    second = slot.state["exp_avg_sq"]
    assert isinstance(second, Tensor)
    for piece in pieces(slot):
        piece.of(second).lerp_(piece.gradient(scale).square().add_(1e-30), 1 - decay)
    return lambda start, stop: second[start:stop].rsqrt()


def first_state(name: str, slot: Slot, bits: int) -> dict[str, Tensor | LowBitState]:
    """The state of a slot that rule `name` has never updated: all zero."""
    count, device = slot.parameter.numel(), slot.weight.device
    dtype = torch.promote_types(slot.weight.dtype, torch.float32)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if name == "adafactor":
        if slot.parameter.ndim < 2:
            return {"exp_avg_sq": zeros(count)}
        columns = slot.parameter.shape[-1]
        return {"row": zeros(count // columns), "column": zeros(columns)}
    low = LowBitState.fits(count, bits)
    return {
        kind: LowBitState(count, bits, signed, device) if low else zeros(*slot.parameter.shape)
        for kind, signed in MOMENTS[name].items()
    }
