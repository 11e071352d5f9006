"""nn.Linear for models that generate: a single row in bfloat16 on a CPU takes the matrix-vector kernel."""

import torch
from torch import Tensor, nn

from ropewalk.ops.product import product, widens
from ropewalk.ops.quantized import QuantizedTensor
from ropewalk.ops.reference import using_references


class Linear(nn.Linear):
    """nn.Linear, but faster for one row `[1, ..., 1, in_features]` of bfloat16 on a CPU without gradients.

    There torch's matrix product repacks the weight each time; `mv` reads it once, which is all that decoding
    one token costs: 1.5 to 2 times as fast on a CPU with AMX. Both sum in float32 and round once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input `[..., in_features]` -> `[..., out_features]`."""
        weight = self.weight
        if (
            weight.dtype is torch.bfloat16
            and input.numel() == weight.shape[1]
            and not torch.is_grad_enabled()
            and input.dtype is torch.bfloat16
            and input.device.type == "cpu"
            and not isinstance(weight, QuantizedTensor)
            and not using_references()
        ):
            row = input.reshape(-1)
            out = weight.mv(row) if self.bias is None else torch.addmv(self.bias, weight, row)
            return out.view(*input.shape[:-1], -1)
        rows = input.reshape(-1, input.shape[-1])
        if not isinstance(weight, QuantizedTensor) and widens(rows, weight.t()):
            return product(rows, weight.t(), self.bias).view(*input.shape[:-1], -1)
        return nn.functional.linear(input, weight, self.bias)
