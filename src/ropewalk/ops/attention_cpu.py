"""Causal attention of packed documents on a CPU with AVX-512: `cpu/attention.cpp` as operations of torch."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ropewalk.ops.native import library, run

ALL = 1 << 40
"""A window that no document reaches."""


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.data_ptr(), x.stride(0), x.stride(1))


class _Problem(ctypes.Structure):
    _fields_ = (
        ("documents", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "count tokens heads kv_heads dim parts window".split()),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@functools.cache
def possible() -> bool:
    """Whether this machine has the kernel: AVX-512, or AMX if the system lets us use it, and a compiler."""
    kernels = library()
    if kernels is None or not hasattr(kernels, "attention_possible"):
        return False
    kernels.attention_possible.restype = ctypes.c_bool
    for name in ("attention_forward", "attention_backward"):
        getattr(kernels, name).restype = ctypes.c_bool
    return bool(kernels.attention_possible())


def takes(q: Tensor, scale: float) -> bool:
    """Whether the kernel computes these queries; what else attention may be told is for the caller to see."""
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and scale > 0 and possible()


def parts(documents: int, heads: int, kv_heads: int) -> int:
    """Where documents are few, each of a key-value head's query heads is a thread's work of its own."""
    return heads // kv_heads if documents * kv_heads < 2 * torch.get_num_threads() else 1


@torch.library.custom_op("ropewalk::attention", mutates_args=())
def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: list[int], window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """q `[T, heads, D]`, k and v `[T, kv_heads, D]`, bfloat16 -> as q, zeros where no document is; and the
    logarithms of the sums of exponentials, `[heads, T]` float32.

    `documents` are pairs of first token and length, the longest first; `window` as for `attention`, or ALL;
    `softcap` too, or 0.
    """
    q, k, v = (_in_rows(x) for x in (q, k, v))
    out = _maker(documents, q)(q.shape)
    sums = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    rows = [_Rows(x) for x in (q, k, v, out)]
    _run("attention_forward", *rows, sums, _problem(q, k, documents, window, softcap, scale))
    return out, sums


@cpu_attention.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("ropewalk::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    documents: list[int],
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = (_in_rows(x) for x in (grad, q, k, v))
    problem = _problem(q, k, documents, window, softcap, scale)
    make, sizes = _maker(documents, q), (problem.parts, *k.shape)
    dq, dk, dv = make(q.shape), make(sizes, dtype=torch.float32), make(sizes, dtype=torch.float32)
    rows = [_Rows(x) for x in (grad, q, k, v, out)]
    _run("attention_backward", *rows, sums, _Rows(dq), dk, dv, problem)
    dk, dv = (x[0] if problem.parts == 1 else x.sum(0) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _slopes(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = torch.ops.ropewalk.attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None


cpu_attention.register_autograd(_slopes, setup_context=_keep)


def _problem(
    q: Tensor, k: Tensor, documents: list[int], window: int, softcap: float, scale: float
) -> _Problem:
    count, (tokens, heads, dim), kv_heads = len(documents) // 2, q.shape, k.shape[1]
    table = (ctypes.c_int64 * len(documents))(*documents)
    sizes = count, tokens, heads, kv_heads, dim, parts(count, heads, kv_heads), window
    problem = _Problem(ctypes.addressof(table), *sizes, scale, softcap)
    problem.table = table  # as long as the pointer to it
    return problem


def _run(name: str, *arguments: Any) -> None:
    assert possible()
    if arguments[-1].count and not run(name, *arguments):
        raise MemoryError(f"{name}: no memory for what its threads need")


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _maker(documents: list[int], q: Tensor) -> Callable[..., Tensor]:
    """What makes room for results: with zeros where documents leave tokens out."""
    return q.new_empty if sum(documents[1::2]) == len(q) else q.new_zeros
