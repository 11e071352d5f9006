"""SwiGLU's product (arXiv 2002.05202), `silu(gate) * up`, which keeps its inputs only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.ops.native import run_on, takes
from ropewalk.ops.reference import using_references


def gated_silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """The same, rounded once. On a CPU in one pass over memory each way, and silu's result is not kept."""
    if using_references() or not takes(gate):
        return gated_silu_reference(gate, up)
    return _forward(gate, up)


@torch.library.custom_op("ropewalk::gated_silu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    run_on(gate, "gated", up, gate.numel(), out)
    return out


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("ropewalk::gated_silu_backward", mutates_args=())
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gate_slopes, up_slopes = torch.empty_like(gate), torch.empty_like(up)
    run_on(grad, "gated_slopes", gate, up, gate.numel(), gate_slopes, up_slopes)
    return gate_slopes, up_slopes


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _slopes(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_slopes, setup_context=_keep)
