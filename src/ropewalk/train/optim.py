"""AdamW with float32 masters for parameters that compute in bfloat16.

A bfloat16 weight cannot take small updates (8 bits of mantissa), so the optimizer owns a float32 copy of it,
its moments and its gradient. Gradients move to float32 as soon as backward makes them and the bfloat16 ones
are freed, so that micro-batches add up in float32 and only one gradient per parameter is alive. A float32
parameter is its own master: nothing is copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class AdamW:
    """arXiv 1711.05101 over the parameters of `model` that need a gradient.

    Weight decay is applied to matrices only: not to biases, norms and embeddings. This calls torch's fused
    kernel, not torch.optim.AdamW, which imports torch.compile's machinery: 2.5 s and 73 MB.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: self._master(parameter) for name, parameter in self.parameters.items()}
        self.moments: dict[str, Moments] = {}
        """by name, from a parameter's first step on"""
        self._betas, self._epsilon = betas, epsilon
        matrices = set(matrix_names(model))
        self._groups = (
            ([name for name in self.masters if name in matrices], weight_decay),
            ([name for name in self.masters if name not in matrices], 0.0),
        )

    @staticmethod
    def _master(parameter: nn.Parameter) -> Tensor:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = parameter.detach().float()
        master.requires_grad_(True)

        def move_gradient(p: Tensor) -> None:
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move_gradient)
        return master

    def gradients(self) -> list[Tensor]:
        """The accumulated float32 gradients; parameters that got none are left out."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients: 0-d float32, 0 where there are none."""
        gradients = self.gradients()
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_(self.gradients(), factor)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the accumulated gradients, which are freed; what got none stays as it is."""
        for names, weight_decay in self._groups:
            ready = [name for name in names if self.masters[name].grad is not None]
            if not ready:
                continue
            masters = [self.masters[name] for name in ready]
            for name, master in zip(ready, masters, strict=True):
                if name not in self.moments:
                    self.moments[name] = Moments.zero(master)
            moments = [self.moments[name] for name in ready]
            steps = [m.step for m in moments]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                masters,
                [master.grad for master in masters],  # type: ignore[misc]
                [m.exp_avg for m in moments],
                [m.exp_avg_sq for m in moments],
                [],
                steps,
                lr=learning_rate,
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=weight_decay,
                eps=self._epsilon,
                amsgrad=False,
                maximize=False,
            )
            for master in masters:
                master.grad = None
        self._copy_to_parameters()

    def _copy_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """What an exact continuation needs: `master.NAME`, and `exp_avg|exp_avg_sq|step.NAME` once stepped.

        The tensors are the live ones, not copies.
        """
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, moments in self.moments.items():
            tensors |= {f"{key}.{name}": value for key, value in moments._asdict().items()}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave, bit for bit. ValueError where names or shapes do not fit."""
        expected = {f"master.{name}" for name in self.masters}
        found = {name for name in tensors if name.startswith("master.")}
        if expected != found:
            raise ValueError(f"the state is of another model: {min(expected ^ found)} is on one side only")
        for name, master in self.masters.items():
            saved = tensors[f"master.{name}"]
            if saved.shape != master.shape:
                raise ValueError(f"{name} has shape {tuple(master.shape)}, in the state {tuple(saved.shape)}")
            master.copy_(saved)
            if f"step.{name}" in tensors:
                self.moments[name] = Moments.zero(master)
                for key, value in self.moments[name]._asdict().items():
                    value.copy_(tensors[f"{key}.{name}"])
        self._copy_to_parameters()


class Moments(NamedTuple):
    """Optimizer state of one parameter; `step` counts its updates (0-d float32, as the kernel wants it)."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def zero(cls, master: Tensor) -> "Moments":
        step = torch.zeros((), dtype=torch.float32, device=master.device)
        return cls(step, torch.zeros_like(master), torch.zeros_like(master))


def matrix_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: two or more dimensions, no bias, no embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings
    ]
