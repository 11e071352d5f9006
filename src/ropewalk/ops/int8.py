"""Frozen weights in 8 bits: each row in steps of its absolute maximum / 127 (LLM.int8, arXiv 2208.07339).

A scale for each row, and no smaller blocks: pieces of a matrix, of rows or of columns, then have the very
values that the whole one has, in every layout, and the scales cost 4 bytes a row.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from ropewalk.ops.quantized import QuantizedTensor, check_finite

# Values worked on at once: on a CPU half a megabyte of float32, which stays in the cache.
_CPU_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 24
_LEAST = torch.finfo(torch.float32).tiny


class Int8Tensor(QuantizedTensor):
    """A QuantizedTensor of 8 bits a value: `codes` [rows, columns] times `scales` [rows].

    Rows are those of the first dimension; what has only one dimension is one row. A value differs from its
    original by half a scale at most, and by what its dtype rounds.
    """

    PARTS: ClassVar = {"codes": torch.int8, "scales": torch.float32}
    scales: Tensor

    @classmethod
    def quantize(cls, tensor: Tensor) -> "Int8Tensor":
        """Rounds a floating tensor to the nearest codes. Beyond the result it takes a few megabytes.

        Raises UserError for values that are not finite.
        """
        (rows, width), _ = cls.part_shapes(tensor.shape)
        values = tensor.detach().reshape(rows, width)
        codes = torch.empty(values.shape, dtype=torch.int8, device=tensor.device)
        scales = torch.zeros(rows, device=tensor.device, dtype=torch.float32)
        for some in _chunks(values) if width else ():
            wide = values[some].float()
            # at least the least normal number: a row of zeros has zeros for codes
            scales[some] = wide.abs().amax(1).div_(127).clamp_(min=_LEAST)
            codes[some] = wide.div(scales[some].unsqueeze(1)).round_().to(torch.int8)
        check_finite(scales)
        return cls((codes, scales), tensor.shape, tensor.dtype)

    @classmethod
    def part_shapes(cls, shape: tuple[int, ...], *form: int) -> tuple[tuple[int, ...], ...]:
        """Of codes and scales."""
        rows = shape[0] if len(shape) > 1 else 1
        return (rows, math.prod(shape[len(shape) > 1 :])), (rows,)

    def columns(self, start: int, count: int) -> "Int8Tensor":
        """Some columns of a matrix, in memory of their own."""
        parts = self.codes[:, start : start + count].contiguous(), self.scales.clone()
        return Int8Tensor(parts, torch.Size((self.shape[0], count)), self.dtype)

    def _write(self, out: Tensor) -> None:
        target, scales = out.view(self.codes.shape), self.scales.unsqueeze(1)
        if out.device.type != "cpu":  # one kernel does it
            torch.mul(self.codes, scales, out=target)
            return
        for some in _chunks(target):  # a CPU makes float32 copies first
            torch.mul(self.codes[some], scales[some], out=target[some])

    def _traced(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.device)
        return torch.mul(self.codes, self.scales.unsqueeze(1), out=out).view(self.shape)

    def _unit(self) -> int:
        return self.codes.shape[1]

    def _cut(self, first: int, count: int, shape: torch.Size) -> "Int8Tensor":
        parts = self.codes[first : first + count], self.scales[first : first + count]
        return Int8Tensor(parts, shape, self.dtype)


def _chunks(values: Tensor) -> list[slice]:
    """Of the rows of a matrix, so many at once as make a chunk."""
    rows, width = values.shape
    size = max(1, (_CPU_CHUNK if values.device.type == "cpu" else _DEVICE_CHUNK) // max(1, width))
    return [slice(start, start + size) for start in range(0, rows, size)]
