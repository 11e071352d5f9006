"""Collectives that gradients go through: each with the one that is its gradient."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]


def exchanged(x: Tensor, forward: Exchange, backward: Exchange) -> Tensor:
    """`forward(x)`, whose gradient is `backward` of that of the result."""
    return _Exchanged.apply(x, forward, backward)


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over the processes, of which each does the same with it: its gradient is everyone's own."""

    def total(x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    return exchanged(x, total, _same)


def all_gather(out: Tensor, x: Tensor, group: Any, *, wait: bool = True) -> Any:
    """Everyone's `x`, by process along the first dimension of `out`. Without `wait`: what to wait for."""
    return _newest("all_gather_single", "all_gather_into_tensor")(out, x, group=group, async_op=not wait)


def reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    """The sum of everyone's `x`, of which `out` is this process's part along the first dimension."""
    _newest("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)


def _newest(name: str, before: str) -> Any:
    """torch 2.13 warns of the names that it had before."""
    return getattr(dist, name, None) or getattr(dist, before)


def _same(x: Tensor) -> Tensor:
    return x


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Exchange, backward: Exchange) -> Tensor:
        ctx.exchange = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange(grad), None, None
