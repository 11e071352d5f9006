"""Matrix products of bfloat16 tensors, done in float32 on processors that are faster at that."""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from ropewalk.ops.reference import using_references

_PANEL = 1 << 20
"""Numbers of a panel in float32: 4 MB, which stay in the cache between the cast and the product."""
_LEAST = 64
"""Shortest side of a product that is worth the casts."""
_LONG, _ROWS = 8192, 256
"""Sums so long are done for so few rows at a time: oneDNN leaves more of them to a single thread (measured:
1.2 to 1.75 times as fast for 1,024 rows, 32,000 to 128,256 terms, on two cores with AMX)."""
_buffers = threading.local()


def _slow_bfloat16() -> bool:
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("architecture") != "x86_64" or known.get("amx_bf16"):
        return False
    return not (known.get("avx512_bf16") and "AMD" in str(known.get("cpu_name")))


_faster = _slow_bfloat16()


def float32_is_faster() -> bool:
    """Whether this processor multiplies float32 matrices faster than bfloat16 ones.

    x86-64 without AMX. Where there is AVX512-BF16, one Xeon was measured at 320 GFLOP/s in float32 and 163 in
    bfloat16; where there is none, torch has no fast kernel at all. AMD's AVX512-BF16 is taken at its word.
    """
    return _faster


def widens(a: Tensor, b: Tensor) -> bool:
    """Whether `product` and `multiply` go through float32."""
    return (
        a.dtype is torch.bfloat16
        and a.device.type == "cpu"
        and float32_is_faster()
        and min(*a.shape, b.shape[1]) >= _LEAST
        and not using_references()
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` in the dtype of a [M, K] and b [K, N], bias [N]; summed in float32, rounded once."""
    if widens(a, b):
        return torch.ops.ropewalk.product(a, b, bias)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """`out = a @ b`, or `out += a @ b`; no gradient, and each panel's part of `out` is rounded."""
    if widens(a, b):
        return _write(a, b, out, None, add)
    if (
        a.dtype is torch.bfloat16
        and a.device.type == "cpu"
        and a.shape[1] >= max(_LONG, 4 * b.shape[1])
        and a.shape[0] > _ROWS
    ):
        for rows in range(0, a.shape[0], _ROWS):
            multiply(a[rows : rows + _ROWS], b, out[rows : rows + _ROWS], add)
        return out
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def add_product(y: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """`y += factor * a @ b` for a y [M, N] that nobody else has; y. In compiled code too, where addmm_ would
    become an addmm, which copies y first: that took 4% of a LoRA step of an 8B model on an H100."""
    if torch.compiler.is_compiling():
        torch.ops.ropewalk.add_product_(y, a, b, factor)
        return y
    return y.addmm_(a, b, alpha=factor)


def _write(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, add: bool = False) -> Tensor:
    """Cuts the longest of the three sides, so that what is held in float32 beside the inputs is small."""
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, k, n)
    size = max(_LEAST, _PANEL // sorted((m, k, n))[1])
    cuts = [slice(start, start + size) for start in range(0, longest, size)]
    if k == longest:
        total = _scratch("result", m, n)
        total.zero_() if bias is None else total.copy_(bias.expand(m, n))
        for cut in cuts:
            total.addmm_(_cast("left", a[:, cut]), _cast("right", b[cut]))
        return out.add_(total) if add else out.copy_(total)
    by_rows = m == longest
    whole = _cast("right", b) if by_rows else _cast("left", a)
    for cut in cuts:
        part = out[cut] if by_rows else out[:, cut]
        pair = (_cast("left", a[cut]), whole) if by_rows else (whole, _cast("right", b[:, cut]))
        panel = torch.mm(*pair, out=_scratch("result", *part.shape))
        if bias is not None:
            panel += bias if by_rows else bias[cut]
        if add:
            part.add_(panel)
        else:
            part.copy_(panel)
    return out


def _cast(name: str, x: Tensor) -> Tensor:
    """`x` in float32, laid out as it is: products take a transposed matrix as it comes."""
    if x.stride(0) == 1 and x.stride(1) != 1:
        return _scratch(name, x.shape[1], x.shape[0]).copy_(x.t()).t()
    return _scratch(name, *x.shape).copy_(x)


def _scratch(name: str, *shape: int) -> Tensor:
    """A float32 tensor on the CPU that is overwritten by the next one of that name in this thread.

    Made anew each time, they would leave gaps between the activations that are kept: a step of SmolLM2-135M
    then took 0.3 GB more. Large ones are not kept.
    """
    size = math.prod(shape)
    if size > 4 * _PANEL:
        return torch.empty(shape)
    kept: dict[str, Tensor] = _buffers.__dict__
    if name not in kept or kept[name].numel() < size:
        with torch.inference_mode(False):  # where generation makes it, training uses it too
            kept[name] = torch.empty(size)
    return kept[name][:size].view(shape)


# An operation of its own, so that selective checkpointing sees one product and not its panels.
@torch.library.custom_op("ropewalk::product", mutates_args=())
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return _write(a, b, a.new_empty(a.shape[0], b.shape[1]), bias)


@_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("ropewalk::add_product_", mutates_args=("y",))
def _add_product(y: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    y.addmm_(a, b, alpha=factor)


@_add_product.register_fake
def _(y: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    return None


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, need_bias = ctx.needs_input_grad
    return (
        product(slope, b.t()) if need_a else None,
        # laid out as the transpose that b mostly is: a weight's gradient is contiguous
        product(slope.t(), a).t() if need_b else None,
        slope.sum(0) if need_bias else None,
    )


_product.register_autograd(_backward, setup_context=_keep)
