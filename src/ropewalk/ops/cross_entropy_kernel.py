"""Cross-entropy of rows of logits on a GPU, in place: a Triton kernel that reads each row twice.

The plain form moves a row in float32 through memory about ten times. Triton, which torch's CUDA builds bring,
is imported here: import this module only where it is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def run_kernel(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    z_loss: float,
    slopes: bool,
    factors: Tensor | None,
) -> Tensor:
    """What `cross_entropy_rows` says, a program for each row; sums in float32."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _kernel[(rows,)](
            logits,
            targets,
            losses if factors is None else factors,
            losses,
            vocab,
            logits.stride(0),
            softcap or 1.0,
            z_loss,
            capped=softcap is not None,
            slopes=slopes,
            scaled=factors is not None,
            block=_BLOCK,
            num_warps=8,
        )
    return losses


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    factors,
    losses,
    vocab,
    stride,
    cap,
    z_loss,
    capped: tl.constexpr,
    slopes: tl.constexpr,
    scaled: tl.constexpr,
    block: tl.constexpr,
) -> Any:
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    target = tl.load(targets + row)
    places = tl.arange(0, block)
    # Each lane has a maximum and a sum of its own (arXiv 1805.02867); -3e38 stands for no logit.
    high = tl.full([block], -3.0e38, tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, vocab, block):
        inside = start + places < vocab
        x = tl.load(base + start + places, inside, other=0.0).to(tl.float32)
        if capped:
            x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
        x = tl.where(inside, x, -3.0e38)
        higher = tl.maximum(high, x)
        total = total * tl.exp(high - higher) + tl.exp(x - higher)
        high = higher
    most = tl.max(high, 0)
    log_total = most + tl.log(tl.sum(total * tl.exp(high - most), 0))
    own = tl.load(base + target).to(tl.float32)
    if capped:
        own = cap * (2 * tl.sigmoid(2 * own / cap) - 1)
    tl.store(losses + row, log_total - own + z_loss * log_total * log_total)
    if slopes:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        pull = 1 + 2 * z_loss * log_total
        factor = 1.0
        if scaled:
            factor = tl.load(factors + row).to(tl.float32)
        for start in range(0, vocab, block):
            inside = start + places < vocab
            x = tl.load(base + start + places, inside, other=0.0).to(tl.float32)
            bend = 1.0
            if capped:
                tanh = 2 * tl.sigmoid(2 * x / cap) - 1
                x = cap * tanh
                bend = 1 - tanh * tanh
            slope = tl.exp(x - log_total) * pull - tl.where(start + places == target, 1.0, 0.0)
            tl.store(base + start + places, (slope * bend * factor).to(logits.dtype.element_ty), inside)
