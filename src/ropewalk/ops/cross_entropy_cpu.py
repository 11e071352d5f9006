"""Softmax cross-entropy on a CPU: `cpu/cross_entropy.cpp` as an operation of torch."""

import ctypes

import torch
from torch import Tensor

from ropewalk.ops.native import library

_NAMES = {torch.bfloat16: "cross_entropy_bfloat16", torch.float32: "cross_entropy_float32"}


def runs_natively(logits: Tensor) -> bool:
    """Whether `torch.ops.ropewalk.cross_entropy_` takes these logits."""
    return logits.device.type == "cpu" and logits.dtype in _NAMES and library() is not None


@torch.library.custom_op("ropewalk::cross_entropy_", mutates_args=("logits",))
def _cross_entropy(
    logits: Tensor, targets: Tensor, z_loss: float, slopes: bool, factors: Tensor | None
) -> Tensor:
    """`linear_cross_entropy.cross_entropy_rows` without a soft-cap; logits [c, V] are contiguous."""
    kernels = library()
    assert kernels is not None
    assert logits.is_contiguous()
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    factors = None if factors is None else factors.to(torch.float32).contiguous()
    at = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (logits, targets, factors, losses)]
    rows, vocabulary = map(ctypes.c_int64, logits.shape)
    run, threads = getattr(kernels, _NAMES[logits.dtype]), torch.get_num_threads()
    run(at[0], rows, vocabulary, at[1], ctypes.c_float(z_loss), at[2], ctypes.c_bool(slopes), at[3], threads)
    return losses


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, z_loss: float, slopes: bool, factors: Tensor | None) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)
