"""The arithmetic of NF4: floating values to 4-bit codes and back (QLoRA, arXiv 2305.14314).

64 neighbouring values share an absolute maximum and are rounded to the nearest of 16 quantiles of a normal
distribution; 256 neighbouring maxima, less their mean, are rounded to 8 bits ("dynamic" codes, arXiv
1511.04561): 4.13 bits a value. Layout and values are those of bitsandbytes.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.ops.quantized import check_finite, is_traced


def _dynamic_levels() -> tuple[float, ...]:
    """The 256 values of the 8-bit dynamic type: 7 decades, each with twice the values of the one below."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += means.tolist() + (-means).tolist()
    return tuple(sorted(levels))


BLOCK = 64
"""Values that share an absolute maximum."""
GROUP = 256
"""Blocks whose maxima share one."""
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat4 (QLoRA, appendix E)."""
SCALE_LEVELS = _dynamic_levels()

# Values worked on at once: on a CPU half a megabyte of float32, which stays in the cache.
_CPU_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 24


def quantize_values(flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scale_codes, scale_absmax and offset of the values of `flat` [n]: the parts of an NF4Tensor."""
    blocks = -(-flat.numel() // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    size = _chunk(flat)
    for start in range(0, flat.numel(), size):
        values = flat[start : start + size].float()
        values = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        some = absmax[start // BLOCK : start // BLOCK + values.shape[0]]
        torch.amax(values.abs(), 1, out=some)
        # as bitsandbytes: times the reciprocal, which may differ from a division in the last bit
        scaled = values * some.clamp(min=1e-38).reciprocal().unsqueeze(1)
        codes_here = _nearest(scaled.flatten(), LEVELS)
        packed = codes[start // 2 : start // 2 + values.numel() // 2]
        torch.bitwise_or(codes_here[::2] << 4, codes_here[1::2], out=packed)
    check_finite(absmax)
    offset = absmax.mean() if blocks else absmax.new_zeros(())
    return codes, *_quantize_scales(absmax - offset), offset


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Index of the nearest of the few sorted levels, uint8; half way: the lower one."""
    result = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    middles = torch.tensor(levels)  # float32 middles, as others have them
    for middle in ((middles[1:] + middles[:-1]) / 2).tolist():  # comparing is faster than searching
        result.add_((values > middle).view(torch.uint8))
    return result


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The 8-bit code of each value [n], and the absolute maximum of each group of 256."""
    groups = F.pad(scales, (0, -scales.numel() % GROUP)).view(-1, GROUP)
    absmax = groups.abs().amax(1) if len(groups) else groups.new_zeros(0)
    scaled = groups * absmax.clamp(min=1e-38).reciprocal().unsqueeze(1)
    levels = torch.tensor(SCALE_LEVELS, device=scales.device)
    codes = torch.bucketize(scaled.flatten(), (levels[1:] + levels[:-1]) / 2)
    return codes[: scales.numel()].to(torch.uint8), absmax


def write_values(
    codes: Tensor, scale_codes: Tensor, scale_absmax: Tensor, offset: Tensor, group: int, out: Tensor
) -> None:
    """Values into the flat `out`, chunk by chunk: a table turns each byte into two float32 values."""
    table, scales = _pairs(codes.device), _scales(scale_codes, scale_absmax, offset, group)
    size = max(BLOCK, min(_chunk(codes), codes.numel() * 2))
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    pairs = torch.empty(size // 2, dtype=table.dtype, device=codes.device)
    for start in range(0, out.numel(), size):
        some = codes[start // 2 : (start + size) // 2]
        count = some.numel()
        index[:count].copy_(some)
        torch.index_select(table, 0, index[:count], out=pairs[:count])
        values = pairs[:count].view(torch.float32).view(-1, BLOCK)
        values.mul_(scales[start // BLOCK : start // BLOCK + values.shape[0]].unsqueeze(1))
        target = out[start : start + size]
        target.copy_(values.view(-1)[: target.numel()])


def plain_values(
    codes: Tensor, scale_codes: Tensor, scale_absmax: Tensor, offset: Tensor, group: int
) -> Tensor:
    """`[blocks, 64]` float32 by operations on the whole: what a compiler fuses, and the plain reference."""
    levels = torch.tensor(LEVELS, device=codes.device)
    nibbles = torch.stack((codes >> 4, codes & 15), 1).view(-1, BLOCK)
    return levels[nibbles.int()] * _scales(scale_codes, scale_absmax, offset, group).unsqueeze(1)


def _scales(scale_codes: Tensor, scale_absmax: Tensor, offset: Tensor, group: int) -> Tensor:
    """Absolute maximum of each block, `[blocks]` float32."""
    wide = scale_absmax.repeat_interleave(group)[: scale_codes.numel()]
    device = scale_codes.device
    levels = torch.tensor(SCALE_LEVELS, device=device) if is_traced(wide) else _scale_levels(device)
    return levels[scale_codes.int()] * wide + offset


# An operation of its own: on a CPU what a compiler makes of plain_values is 4 times as slow as this.
@torch.library.custom_op("ropewalk::nf4_dequantize", mutates_args=())
def _dequantize(
    codes: Tensor,
    scale_codes: Tensor,
    scale_absmax: Tensor,
    offset: Tensor,
    group: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    write_values(codes, scale_codes, scale_absmax, offset, group, out.view(-1))
    return out


@_dequantize.register_fake
def _(codes: Tensor, *others: Any) -> Tensor:
    *_, shape, dtype = others
    return torch.empty(shape, dtype=dtype, device=codes.device)


@cache
def _scale_levels(device: torch.device) -> Tensor:
    return torch.tensor(SCALE_LEVELS, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """`[256]`: the two float32 values of each byte, as one 8-byte element."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), 1).view(torch.int64).flatten().to(device)


def _chunk(tensor: Tensor) -> int:
    return _CPU_CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK
