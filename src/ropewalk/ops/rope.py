"""Rotary position embeddings (arXiv 2104.09864) and the ways to stretch them."""

import math
from typing import Any

import torch
from torch import Tensor

from ropewalk.ops.native import run_on, takes
from ropewalk.ops.reference import using_references


def rope_frequencies(
    theta: float, dim: int, scaling: dict[str, Any] | None, max_positions: int, length: int | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, `[ceil(dim / 2)]` float32, and the factor on cos and sin.

    dim is the number of rotated elements of a head; scaling is ModelConfig.rope_scaling; max_positions is
    max_position_embeddings. `length`, the number of positions in use, matters to the kinds that depend on it
    (`depends_on_length`). Formulas as in transformers' modeling_rope_utils, to the same float32 rounding.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", "default")
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if kind == "dynamic":
        factor = scaling["factor"]
        stretch = factor * max(length or 0, max_positions) / max_positions - (factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    frequency = 1.0 / theta**exponent
    if kind == "linear":
        return frequency / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    if kind == "yarn":
        return _yarn(theta, dim, exponent, scaling)
    if kind == "longrope":
        return _longrope(theta, exponent, scaling, max_positions, length)
    return frequency, 1.0


def depends_on_length(scaling: dict[str, Any] | None) -> bool:
    """Whether the frequencies change with the number of positions in use."""
    return scaling is not None and scaling["rope_type"] in ("dynamic", "longrope")


def effective_length(scaling: dict[str, Any], max_positions: int, length: int) -> int:
    """The shortest length with the same frequencies as `length`."""
    if scaling["rope_type"] == "longrope":
        original = scaling["original_max_position_embeddings"]
        return original + 1 if length > original else 1
    return max(length, max_positions)


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: slow down waves longer than the original context, keep short ones, blend between."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / factor + blend * frequency
    result = torch.where(wavelength > original / low, frequency / factor, frequency)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, result)


def _yarn(theta: float, dim: int, exponent: Tensor, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow waves, keep fast ones, and sharpen attention."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def sharpen(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = sharpen(mscale) / sharpen(mscale_all) if mscale and mscale_all else sharpen(1.0)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    keep = 1 - ramp
    base = theta**exponent
    return 1.0 / (factor * base) * (1 - keep) + 1.0 / base * keep, float(attention)


def _longrope(
    theta: float, exponent: Tensor, scaling: dict[str, Any], max_positions: int, length: int | None
) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one set of factors up to the original context, another beyond it."""
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = scaling["long_factor" if length is not None and length > original else "short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**exponent), float(attention)


def rope_tables(
    positions: Tensor, frequency: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each `[B, S, 1, pairs]` of `dtype`, of float32 angles; positions are `[B, S]`."""
    angles = positions[..., None].float() * frequency
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `2 * pairs` elements of each head of x `[B, S, heads, head_dim]`.

    Element i is paired with element `pairs + i`, as in transformers, not with its neighbour as in the paper.
    On a CPU in one pass over memory, rounded once.
    """
    if takes(x) and cos.dtype == x.dtype and not using_references():
        tables = [t.expand(*x.shape[:2], 1, -1).contiguous() for t in (cos, sin)]
        return _rotate(x, *tables, False)
    pairs = cos.shape[-1]
    if 2 * pairs == x.shape[-1]:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


@torch.library.custom_op("ropewalk::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    x = x.contiguous()
    out, (tokens, pairs) = torch.empty_like(x), cos.flatten(0, 2).shape
    run_on(x, "rotate", cos, sin, tokens, *x.shape[2:], pairs, inverse, out)
    return out


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.inverse = inputs[3]


def _turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_turn_back, setup_context=_keep)
