"""What the optimizer keeps of each parameter, and what its update takes besides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.plan.weights import Parameter, part_of
from ropewalk.plan.work import Work
from ropewalk.train.optim_lowbit import BLOCK, LowBitState
from ropewalk.train.optim_slot import CHUNK

_MOMENTS = {"adamw": 2, "lion": 1, "muon": 1}


@dataclass(frozen=True)
class Slot:
    """A trained parameter, or `count` of them: this process's part."""

    rule: str
    shape: tuple[int, ...]
    numbers: int
    count: int


@dataclass(frozen=True)
class Held:
    """Bytes on the device, and on the host where they are kept there."""

    slots: tuple[Slot, ...]
    """in the order of the model"""
    states: int
    masters: int
    gradients: int
    """all of them, as the update finds them"""
    host: dict[str, int]


def held(work: Work, parameters: Sequence[Parameter]) -> Held:
    """What the optimizer has from its first update on."""
    slots = tuple(_slot(p, work) for p in parameters if p.trained)
    numbers = sum(slot.numbers * slot.count for slot in slots)
    states = sum(state_bytes(slot, work.state_bits) * slot.count for slot in slots)
    wide = work.precision != "float32" and work.masters
    masters = 4 * numbers if wide else 0
    each = 4 if work.accumulation > 1 else work.parameter_bytes
    gradients = 0 if work.in_backward else each * numbers
    if work.offload and work.device == "cuda":
        copies = masters or work.parameter_bytes * numbers
        found = {"optimizer states": states, "masters": copies, "gradients": gradients}
        return Held(slots, 0, 0, 0, found)
    return Held(slots, states, masters, gradients, {})


def _slot(parameter: Parameter, work: Work) -> Slot:
    rule: str = work.optimizer
    hidden = len(parameter.shape) == 2 and parameter.name not in _OUTSIDE
    if rule == "muon" and not hidden:
        rule = "adamw"
    return Slot(rule, parameter.shape, part_of(parameter, work.layout), parameter.count)


_OUTSIDE = ("embed.weight", "embed_positions.weight", "head.weight", "virtual_tokens.embedding.weight")


def state_bytes(slot: Slot, bits: int) -> int:
    """Of one of them: `train.optim_rules.first_state`."""
    if slot.rule == "adafactor":
        if len(slot.shape) < 2:
            return 4 * slot.numbers
        return 4 * (slot.numbers // slot.shape[-1] + slot.shape[-1])
    moment = 4 * slot.numbers
    if LowBitState.fits(slot.numbers, bits):
        moment = slot.numbers * bits // 8 + 4 * (slot.numbers // BLOCK[bits])
    return _MOMENTS[slot.rule] * moment


def update_peak(work: Work, held: Held) -> int:
    """Most of gradients and temporaries together while weights are updated, rule by rule."""
    left, most = held.gradients, held.gradients
    if work.in_backward or held.host:
        return most
    rules = dict.fromkeys(slot.rule for slot in held.slots)
    each = 4 if work.accumulation > 1 else work.parameter_bytes
    for rule in rules:
        mine = [slot for slot in held.slots if slot.rule == rule]
        if rule in ("adamw", "lion"):
            most = max(most, left + _elementwise(work, mine, each))
            left -= sum(each * slot.numbers * slot.count for slot in mine)
            continue
        for slot in mine:
            temporary = _orthogonal(slot, each) if rule == "muon" else _factored(slot, work, each)
            most = max(most, left + temporary)
            left -= each * slot.numbers * slot.count
    return most


def piece_bytes(work: Work, parameter: Parameter) -> int:
    """What AdamW and Lion take to update one parameter in backward, beside its gradient."""
    slot = _slot(parameter, work)
    return _elementwise(work, [slot], work.parameter_bytes) if slot.rule in ("adamw", "lion") else 0


def _elementwise(work: Work, slots: list[Slot], each: int) -> int:
    """Of AdamW and Lion: pieces in float32 of what has fewer bits; Lion's directions."""
    plain = work.precision == "float32" and work.state_bits == 32
    total = sum(slot.numbers * slot.count for slot in slots)
    if plain:
        return 4 * total if work.optimizer == "lion" else 0
    piece = min(CHUNK[work.device], total)
    rounds = work.precision != "float32" and not work.masters
    low = work.state_bits < 32
    by_kernel = slots[0].rule == "adamw" and work.device == "cuda" and work.state_bits != 4
    if by_kernel and (rounds or low):
        return 0  # `train.optim_kernel` makes nothing beside what is kept
    copies = 4 * rounds, 4 * (each == 2), 4 * low * _MOMENTS[slots[0].rule]
    # the next pieces' are made while there are still the last ones'; codes and rounding are made one by one
    besides = max(*copies, 4 * (work.optimizer == "lion")) * piece
    largest = min(piece, max((slot.numbers for slot in slots), default=0))
    return sum(copies) * piece + max(besides, max(16 * low, 10 * rounds) * largest)


def _orthogonal(slot: Slot, each: int) -> int:
    """Of Muon: the gradient in float32, the matrix in bfloat16 before and after a step, and its grams."""
    rows = min(slot.shape)
    copy = 4 * slot.numbers
    return max(copy + 4 * slot.numbers + 6 * rows * rows, 2 * copy if each == 2 else 0)


def _factored(slot: Slot, work: Work, each: int) -> int:
    """Of Adafactor: a piece's gradient, its square, and the inverse root of its second moment."""
    columns = slot.shape[-1] if slot.shape else 1
    piece = min(slot.numbers, max(CHUNK[work.device] // columns, 1) * columns)
    return piece * (12 + (4 if each == 2 else 0)) + 4 * math.prod(slot.shape[-1:])
