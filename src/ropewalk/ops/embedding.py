"""Rows of a table, with a gradient that is summed in float32.

torch adds the gradients of a token that comes often one after the other into its bfloat16 row on a CPU: 300
ones come to 256, where the sum is too large to take another. (On a GPU it sums in float32.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Embedding(nn.Embedding):
    """torch's, by `embedding`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [...] int64, weight [V, H] -> [..., H]. The gradient of a row is rounded once."""
    if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
        rows: Tensor = _Rows.apply(tokens, weight)
        return rows
    return F.embedding(tokens, weight)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        tokens, order = ctx.saved_tensors[0].flatten().sort(stable=True)
        each = slope.flatten(0, -2)[order].float()
        # equal tokens lie together: those of a run are summed, and all of them write the sum to their row
        run = torch.zeros_like(tokens)
        run[1:] = (tokens[1:] != tokens[:-1]).cumsum(0)
        sums = torch.zeros_like(each).index_add_(0, run, each).to(slope.dtype)
        return None, slope.new_zeros(ctx.shape).index_copy_(0, tokens, sums[run])
