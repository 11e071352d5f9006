"""AdamW of one slot on a GPU in one launch: a Triton kernel that reads and writes each number once.

In pieces, an update of weights without masters or of states in 8 bits is a dozen and more passes over memory.
Triton, which torch's CUDA builds bring, is imported here: import this module only where it is used.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ropewalk.train.optim_lowbit import BLOCK, LowBitState, draw_seed
from ropewalk.train.optim_rules import Update
from ropewalk.train.optim_slot import Slot

_ROWS = 4
"""blocks that a program takes, one for each warp: a thread's 8 numbers are 16 bytes in bfloat16"""


def update_slot(slot: Slot, update: Update) -> None:
    """The update number `slot.count` of a slot with gradient and state (float32 or 8 bits), all in place.

    Arithmetic in float32, in the order of torch's fused AdamW. A bfloat16 weight without master is rounded as
    `stochastic_round` says; its draws depend on the seed, the slot's number and its count only.
    """
    assert slot.gradient is not None
    count, (beta1, beta2) = slot.parameter.numel(), update.betas
    kept = (slot.state["exp_avg"], slot.state["exp_avg_sq"])
    states = [state.parts() if isinstance(state, LowBitState) else (state,) for state in kept]
    with torch.cuda.device_of(slot.weight):  # Triton launches on the current device
        _kernel[(triton.cdiv(count, _ROWS * BLOCK[8]),)](
            slot.weight.detach(),
            slot.parameter.detach(),
            slot.gradient.contiguous(),
            *states,
            count,
            draw_seed((update.seed, slot.count, slot.index)) >> 1,  # signed in Triton
            update.scale,
            update.rate * update.decay,
            1 - beta1,
            beta2,
            1 - beta2,
            1 / math.sqrt(1 - beta2**slot.count),
            update.epsilon,
            update.rate / (1 - beta1**slot.count),
            shows=slot.weight is not slot.parameter,
            rows=_ROWS,
            block=BLOCK[8],
            num_warps=_ROWS,
        )


@triton.jit(do_not_specialize=["seed"])
def _kernel(  # type: ignore[no-untyped-def]
    weight,
    parameter,
    gradient,
    first,
    second,
    count,
    seed,
    scale,
    shrink,
    new1,
    old2,
    new2,
    inverse_root,
    epsilon,
    step,
    shows: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> Any:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    places = row * block + tl.arange(0, block)[None, :]
    inside, row_inside = places < count, row * block < count
    w = tl.load(weight + places, inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + places, inside, other=0.0).to(tl.float32) * scale
    m = _read(first, places, inside, row, row_inside)
    v = _read(second, places, inside, row, row_inside)
    m += new1 * (g - m)
    v = old2 * v + new2 * g * g
    w = tl.where(shrink == 0, w, w - shrink * w)  # 0 times infinity is none
    w -= step * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + epsilon)
    _write(first, m, places, inside, row, row_inside)
    _write(second, v, places, inside, row, row_inside)
    if weight.dtype.element_ty == tl.bfloat16:
        a, b, c, d = tl.randint4x(seed, row * (block // 8) + tl.arange(0, block // 8)[None, :])
        words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
        draws = tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
        bits = w.to(tl.int32, bitcast=True)
        bits = tl.where(w == w, bits + draws, bits | 0x400000)  # a carry would make a number of NaN
        tl.store(weight + places, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), inside)
    else:
        tl.store(weight + places, w, inside)
    if shows:
        tl.store(parameter + places, w.to(parameter.dtype.element_ty), inside)


@triton.jit
def _read(state, places, inside, row, row_inside) -> Any:  # type: ignore[no-untyped-def]
    kept = tl.load(state[0] + places, inside, other=0)
    if state[0].dtype.element_ty == tl.uint8:
        scale = tl.load(state[1] + row, row_inside, other=0.0)
        return tl.load(state[2] + kept.to(tl.int32)) * scale
    else:
        return kept


@triton.jit
def _write(state, numbers, places, inside, row, row_inside) -> Any:  # type: ignore[no-untyped-def]
    if state[0].dtype.element_ty == tl.uint8:  # as LowBitState.write
        # as integers magnitudes have the same order, and NaN is the largest: it is not lost
        most = tl.max(tl.abs(numbers).to(tl.int32, bitcast=True), 1, keep_dims=True)
        most = most.to(tl.float32, bitcast=True)
        scale = tl.where(most < 1e-12, 1e-12, most)
        scaled = tl.div_rn(numbers, tl.broadcast_to(scale, numbers.shape))
        bins = (scaled.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
        above = scaled >= tl.load(state[4] + bins)
        tl.store(state[0] + places, tl.load(state[3] + bins) + above.to(tl.uint8), inside)
        tl.store(state[1] + row, scale, row_inside)
    else:
        tl.store(state[0] + places, numbers, inside)
