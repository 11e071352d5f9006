"""Softmax cross-entropy on a CPU: `cpu/cross_entropy.cpp` as an operation of torch."""

import torch
from torch import Tensor

from ropewalk.ops.native import run_on


@torch.library.custom_op("ropewalk::cross_entropy_", mutates_args=("logits",))
def native_rows(
    logits: Tensor, targets: Tensor, z_loss: float, slopes: bool, factors: Tensor | None
) -> Tensor:
    """`linear_cross_entropy.cross_entropy_rows` without a soft-cap."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    factors = None if factors is None else factors.to(torch.float32).contiguous()
    run_on(logits, "cross_entropy", *logits.shape, targets.contiguous(), z_loss, factors, slopes, losses)
    return losses


@native_rows.register_fake
def _(logits: Tensor, targets: Tensor, z_loss: float, slopes: bool, factors: Tensor | None) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)
