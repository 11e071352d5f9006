"""Sums and multiples of large tensors of mixed types on a GPU, in one pass at the memory's speed.

torch's own kernels read such tensors a number at a time. Triton, which torch's CUDA builds bring, is imported
here: import this module only where it is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def add(total: Tensor, part: Tensor) -> Tensor:
    """`total + part` in float32, in place where `total` is that; both contiguous, of one shape."""
    result = total if total.dtype == torch.float32 else torch.empty_like(total, dtype=torch.float32)
    count = total.numel()
    with torch.cuda.device_of(total):  # Triton launches on the current device
        _add[(triton.cdiv(count, _BLOCK),)](result, total, part, count, block=_BLOCK, num_warps=8)
    return result


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x *= factor` for a contiguous x and a 0-d float32 factor on its device: multiplied in float32."""
    count = x.numel()
    with torch.cuda.device_of(x):
        _scale[(triton.cdiv(count, _BLOCK),)](x, factor, count, block=_BLOCK, num_warps=8)
    return x


@triton.jit
def _add(result, total, part, count, block: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < count
    a = tl.load(total + places, inside).to(tl.float32)
    b = tl.load(part + places, inside).to(tl.float32)
    tl.store(result + places, a + b, inside)


@triton.jit
def _scale(x, factor, count, block: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < count
    scaled = tl.load(x + places, inside).to(tl.float32) * tl.load(factor)
    tl.store(x + places, scaled.to(x.dtype.element_ty), inside)
