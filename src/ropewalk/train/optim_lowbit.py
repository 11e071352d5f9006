"""Numbers in few bits: optimizer states as codes of a table, and weights rounded to bfloat16 at random.

States have the data types and blocks of torchao.optim (8 bits: arXiv 2110.02861; 4 bits: arXiv 2309.01507),
and the same codes. torchao is not called: to import it costs 1.7 s and 84 MB, and outside torch.compile
its search for the nearest code takes 30 times as long as the lookup here.
"""

import functools
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = {8: 256, 4: 128}
"""numbers that share a scale, by bits"""
SMALLEST = 4096
"""a state with fewer numbers stays in float32"""


class LowBitState:
    """`count` numbers, all zero at first: a code of 8 or 4 bits each, and one float32 scale per block.

    `signed` says whether they can be negative. `read` and `write` take any run of whole blocks.
    """

    def __init__(self, count: int, bits: int, signed: bool, device: torch.device) -> None:
        self.bits, self.signed = bits, signed
        self.codes = torch.zeros(count * bits // 8, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(count // BLOCK[bits], device=device)

    @staticmethod
    def fits(count: int, bits: int) -> bool:
        return bits < 32 and count >= SMALLEST and count % BLOCK[bits] == 0

    def read(self, start: int, stop: int) -> Tensor:
        """float32 `[stop - start]`, a copy."""
        table = _table(self.bits, self.signed, self.codes.device)
        codes, scale = self._run(start, stop)
        numbers = table.decoded.index_select(0, codes.int()).view(torch.float32)
        return numbers.view(len(scale), -1).mul_(scale.unsqueeze(1)).view(-1)

    def write(self, start: int, stop: int, numbers: Tensor) -> None:
        """Keeps the nearest code of each of `numbers` (float32 `[stop - start]`) over its block's largest."""
        table = _table(self.bits, self.signed, self.codes.device)
        codes, scale = self._run(start, stop)
        blocks = numbers.view(len(scale), -1)
        torch.amax(blocks.abs(), 1, out=scale)
        scaled = (blocks / scale.clamp_(min=1e-12).unsqueeze(1)).view(-1)
        bins = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        nearest = table.lowest.index_select(0, bins)
        nearest += scaled >= table.middle.index_select(0, bins)
        if self.bits == 4:
            nearest = nearest[0::2] * 16 + nearest[1::2]
        codes.copy_(nearest)

    def parts(self) -> tuple[Tensor, ...]:
        """What a kernel needs to read and write it: codes, scales, and the three columns of its table."""
        return self.codes, self.scale, *_table(self.bits, self.signed, self.codes.device)

    def _run(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        block, each = BLOCK[self.bits], 8 // self.bits
        return self.codes[start // each : stop // each], self.scale[start // block : stop // block]


class _Table(NamedTuple):
    """How to find the code of a number, and the number of a code, each by one lookup.

    The upper 16 bits of a float32 sort it into 65,536 bins, so narrow that at most one middle between two
    neighbouring values lies in a bin: the code is the bin's lowest, or the next one from that middle on.
    """

    decoded: Tensor
    """`[256]`: what a byte stands for; for 4 bits a pair of float32, held as one float64"""
    lowest: Tensor
    """`[65536]` uint8"""
    middle: Tensor
    """`[65536]` float32; infinite where no code is above"""


@functools.cache
def _table(bits: int, signed: bool, device: torch.device) -> _Table:
    values = torch.tensor(code_values(bits, signed))
    middles = (values[1:] + values[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    bottom = torch.where(upper < 0, upper | 0xFFFF, upper).view(
        torch.float32
    )  # of a negative bin: far from 0
    lowest = torch.searchsorted(middles, bottom, right=True)
    middle = torch.cat([middles, middles.new_tensor([torch.inf])])[lowest]
    decoded = values
    if bits == 4:
        decoded = (
            torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.float64).view(-1)
        )
    return _Table(decoded.to(device), lowest.to(torch.uint8).to(device), middle.to(device))


def code_values(bits: int, signed: bool) -> list[float]:
    """The numbers in [-1, 1] that the codes 0, 1, ... stand for, ascending.

    8 bits, and 4 with sign: dynamic exponents (arXiv 1511.04561), that is decades, each split twice as finely
    as the one below it; and 0 and 1. 4 bits without sign: sixteenths, and no zero to divide by.
    """
    if bits == 4 and not signed:
        return [(i + 1) / 16 for i in range(16)]
    values, decades = [0.0, 1.0], bits - 1
    for decade in range(decades):
        parts = 2**decade if signed else 2 ** (decade + 1)
        inside = [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0 ** (decade - decades + 1) for i in range(parts)]
        values += inside + ([-value for value in inside] if signed else [])
    return sorted(values)


def stochastic_round(values: Tensor, target: Tensor, seed: tuple[int, ...]) -> None:
    """Writes float32 `values [n]` into bfloat16 `target [n]`, up or down at random: the mean is right.

    16 random bits are added below the last one kept, and carry into it the more often the larger the part cut
    off (arXiv 2010.06192); what bfloat16 can hold stays as it is, and NaN is NaN. The same `seed` draws the
    same bits.
    """
    generator = torch.Generator(values.device).manual_seed(draw_seed(seed))
    words = torch.empty((len(values) + 3) // 4, dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits: four draws each
    bits = words.view(torch.int16)[: len(values)].int().bitwise_and_(0xFFFF)
    bits += values.view(torch.int32)
    bits.masked_fill_(values.isnan(), 0x7FC00000)  # a GPU's has all bits set: a carry makes it -0.0
    target.view(torch.int16).copy_(bits >> 16)


def draw_seed(seed: tuple[int, ...]) -> int:
    """64 bits made of some numbers: other ones for neighbouring numbers."""
    return int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), "little")
