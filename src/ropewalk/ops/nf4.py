"""Frozen weights in 4 bits: NormalFloat4 with double quantization (QLoRA, arXiv 2305.14314).

The type; nf4_codes has the arithmetic, quantized what it shares with other kinds.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ropewalk.errors import UserError
from ropewalk.ops.nf4_codes import BLOCK, GROUP, plain_values, quantize_values, write_values
from ropewalk.ops.quantized import QuantizedTensor


class NF4Tensor(QuantizedTensor):
    """A QuantizedTensor of 4 bits a value.

    Parts: `codes`, two values a byte, the first in the high half; `scale_codes`, one a block; `scale_absmax`,
    one a group of blocks; `offset`, 0-d. Values in row-major order; the last block is padded with zeros.
    """

    PARTS: ClassVar = {
        "codes": torch.uint8,
        "scale_codes": torch.uint8,
        "scale_absmax": torch.float32,
        "offset": torch.float32,
    }
    scale_codes: Tensor
    scale_absmax: Tensor
    offset: Tensor
    group: int

    @staticmethod
    def __new__(
        cls: Any, parts: Iterable[Tensor], shape: torch.Size, dtype: torch.dtype, group: int = GROUP
    ) -> "NF4Tensor":
        self: NF4Tensor = QuantizedTensor.__new__(cls, parts, shape, dtype)  # type: ignore[assignment]
        self.group = group
        return self

    @classmethod
    def quantize(cls, tensor: Tensor) -> "NF4Tensor":
        """Rounds a floating tensor to NF4. Beyond the result it takes a few megabytes, and 4 bytes a block.

        Raises UserError for values that are not finite.
        """
        return cls(quantize_values(tensor.detach().reshape(-1)), tensor.shape, tensor.dtype)

    @classmethod
    def part_shapes(cls, shape: tuple[int, ...], *form: int) -> tuple[tuple[int, ...], ...]:
        """Of codes, scale_codes, scale_absmax and offset."""
        (group,) = form or (GROUP,)
        blocks = -(-math.prod(shape) // BLOCK)
        return (blocks * BLOCK // 2,), (blocks,), (-(-blocks // group),), ()

    def columns(self, start: int, count: int) -> "NF4Tensor":
        """Some columns of a matrix, in memory of their own; UserError where they cut through blocks."""
        rows, width = self.shape
        if width % BLOCK or start % BLOCK or count % BLOCK:
            raise UserError(f"{count} of {width} columns of an NF4 weight cut through its blocks of {BLOCK}")
        single = self._reformed((1,))  # a row's blocks lie in many groups

        def cut(part: Tensor) -> Tensor:
            table = part.view(rows, -1)
            first, wide = (table.shape[1] * n // width for n in (start, count))
            return table[:, first : first + wide].reshape(-1).clone()

        parts = (*map(cut, (single.codes, single.scale_codes, single.scale_absmax)), self.offset)
        return NF4Tensor(parts, torch.Size((rows, count)), self.dtype, 1)

    def _write(self, out: Tensor) -> None:
        write_values(*self._read(), out.view(-1))

    def _traced(self, dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return torch.ops.ropewalk.nf4_dequantize(*self._read(), list(self.shape), dtype)
        # there a compiler fuses it
        return plain_values(*self._read()).view(-1)[: self.numel()].view(self.shape).to(dtype)

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        return self.codes, self.scale_codes, self.scale_absmax, self.offset, self.group

    def _unit(self) -> int:
        return BLOCK

    def _cut(self, first: int, count: int, shape: torch.Size) -> "NF4Tensor":
        whole = self._reformed((math.gcd(self.group, first, count),))
        parts = (
            self.codes[first * BLOCK // 2 : (first + count) * BLOCK // 2],
            self.scale_codes[first : first + count],
            whole.scale_absmax[first // whole.group : (first + count) // whole.group],
            self.offset,
        )
        return NF4Tensor(parts, shape, self.dtype, whole.group)

    def _form(self) -> tuple[int, ...]:
        return (self.group,)

    def _form_of_piece(self, shape: torch.Size) -> tuple[int, ...]:
        return (math.gcd(self.group, -(-math.prod(shape) // BLOCK)),)

    @classmethod
    def _form_of_parts(cls, parts: dict[str, Tensor]) -> tuple[int, ...]:
        blocks, groups, group = parts["scale_codes"].numel(), parts["scale_absmax"].numel(), GROUP
        while group > 1 and -(-blocks // group) < groups:
            group //= 2
        return (group,)

    def _reformed(self, form: tuple[int, ...]) -> "NF4Tensor":
        """The same values in smaller groups of blocks, whose maxima are repeated."""
        (group,) = form
        if group == self.group:
            return self
        absmax = self.scale_absmax.repeat_interleave(self.group // group)
        parts = self.parts() | {"scale_absmax": absmax[: -(-self.scale_codes.numel() // group)]}
        return NF4Tensor(parts.values(), self.shape, self.dtype, group)
