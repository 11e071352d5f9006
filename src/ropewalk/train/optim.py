"""The optimizer: which rule updates which weight, where masters, states and gradients are, and when.

A bfloat16 weight cannot take small updates (8 bits of mantissa). So it either has a float32 master, which is
updated and copied to it, or its updates are rounded at random (`masters=False`). Its gradient is taken off
it as soon as backward has made it: kept as it is, and added up in float32 from the second micro-batch on. A
float32 weight is its own master: nothing is copied. docs/optimizers.md says what each choice costs.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ropewalk.errors import UserError
from ropewalk.parallel import World, axes_of, first_with, has_partial_gradient
from ropewalk.train.optim_rules import MOMENTS, Rule, Update, adafactor, adamw, first_state, lion, muon
from ropewalk.train.optim_slot import Host, Slot

RULES: dict[str, Rule] = {"adamw": adamw, "lion": lion, "muon": muon, "adafactor": adafactor}
KINDS = {"master", "step", "row", "column"} | {
    f"{moment}{form}" for kept in MOMENTS.values() for moment in kept for form in ("", "_codes", "_scale")
}
"""the first parts of the names of `state_tensors`"""
NORM_PART = {"cpu": 1 << 17, "cuda": 1 << 26}


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "lion", "muon", "adafactor"] = "adamw"
    """muon: for matrices inside the model; embeddings, head, norms and biases by AdamW"""
    weight_decay: float = 0.0
    """on matrices only: not on biases, norms and embeddings"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Lion's are usually (0.9, 0.99). Muon's momentum is the first; Adafactor has none."""
    epsilon: float = 1e-8
    """AdamW's; Lion and Muon have none, Adafactor's is 1e-30"""
    state_bits: Literal[32, 8, 4] = 32
    """bits of each number of AdamW's and Lion's states"""
    masters: bool = True
    """False: bfloat16 weights have no float32 master and are rounded at random (arXiv 2010.06192)"""
    offload: bool = False
    """masters, states and gradients are kept, and updates made, in the host's memory (as arXiv 2101.06840)"""
    in_backward: bool = False
    """each weight is updated as soon as its gradient is complete, and the gradient freed"""


def refusals(config: OptimizerConfig) -> list[str]:
    """One sentence for each pair of settings that cannot work together; none: they can."""
    found = []
    if config.in_backward and config.offload:
        found.append("in_backward and offload both take gradients off the device; choose one")
    if config.state_bits < 32 and config.name == "muon":
        found.append(
            "muon's state stays in 32 bits: making it orthogonal enlarges the rounding of small parts"
        )
    if config.state_bits < 32 and config.name == "adafactor":
        found.append("adafactor's state stays in 32 bits: it is a row and a column per matrix")
    return found


class Optimizer:
    """Updates the parameters of `model` that need a gradient.

    A step: `begin(rate)`, backward for each micro-batch, `gradient_norm()` and `scale_gradients(factor)` as
    wanted, `step(rate)`. Without `in_backward`, `begin` may be left out.
    `rate_factors` are multiples of the learning rate by parameter name; `seed` is for rounding at random.
    UserError for a config that `refusals` has something against.
    """

    _OFFLOADED = ("cuda",)
    """device types that `offload` applies to; tests add the CPU"""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        rate_factors: Mapping[str, float] | None = None,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        if refused := refusals(config):
            raise UserError("; ".join(refused))
        self.config, self._factors, self._world = config, dict(rate_factors or {}), world or World()
        self._seed = seed + self._world.index("parts")  # no two parts round alike
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if unknown := self._factors.keys() - self.parameters.keys():
            raise ValueError(f"rate_factors: no trained parameter is named {min(unknown)}")
        self._decayed = set(matrix_names(model))
        matrices = {name for name in self._decayed if model.get_parameter(name).ndim == 2}
        self._hidden = matrices - {"head.weight", "lm_head.weight"}
        devices = {p.device for p in self.parameters.values()}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        offloaded = [d for d in devices if config.offload and d.type in self._OFFLOADED]
        self._hosts = {device: Host(device) for device in offloaded}
        self._slots = {
            name: Slot(i, name, p, config.masters, self._hosts.get(p.device), self._combine(name))
            for i, (name, p) in enumerate(self.parameters.items())
        }
        self._scale = 1.0
        self._rate: float | None = None
        """in_backward: the learning rate from `begin` to `step`"""
        self._norms: dict[str, list[Tensor]] = {}
        """in_backward: of the gradients used up since `begin`"""
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))

    def begin(self, learning_rate: float) -> None:
        """Before the backward pass of a step: with in_backward, updates are made from here to `step`."""
        self._norms.clear()
        self._rate = learning_rate if self.config.in_backward else None

    def receive(self, name: str) -> None:
        """Takes over the gradient that backward has made for a parameter. RuntimeError for a second one where
        the first is used up."""
        slot = self._slots[name]
        slot.receive()
        if self._rate is None:
            return
        if name in self._norms:
            raise RuntimeError(f"{name} got a second gradient in one step, after its update in backward")
        self._norms[name] = _norms([slot])
        self._update([slot], self._rate)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients at hand, as kept: not scaled, in bfloat16 or float32, on the host where offloaded."""
        for host in self._hosts.values():
            host.finish()
        return {name: slot.gradient for name, slot in self._slots.items() if slot.gradient is not None}

    def change_gradient(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Puts another gradient, made of it, in the place of the one at hand."""
        gradient = self.gradients()[name]
        self._slots[name].gradient = change(gradient)

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients, used up ones too: 0-d float32, 0 where there are none."""
        at_hand, world = self.gradients(), self._world
        counted = [name for name in self._slots if first_with(name, world)]
        mine = [norm for name in counted for norm in self._norms.get(name, [])]
        mine += _norms([self._slots[name] for name in counted if name in at_hand])
        square = torch.linalg.vector_norm(torch.stack(mine)).square() if mine else torch.zeros(())
        # each part is counted by one process: all sums are one
        return world.sum_everywhere(square.to(self._device)).sqrt() * self._scale

    def _combine(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What adds up the parts of a gradient that the processes of a tensor group make of it."""
        copies, _ = axes_of(name, self._world)
        if self._world.layout.tensor == 1 or "tensor" not in copies or not has_partial_gradient(name):
            return None
        return partial(self._world.sum_along, "tensor")

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients, when the update reads them. Not those used up in backward."""
        self._scale *= factor

    def discard(self) -> None:
        """Drops all gradients: the next backward begins anew."""
        for name in self.gradients():
            self._slots[name].gradient = None
        self._norms.clear()
        self._scale, self._rate = 1.0, None

    def step(self, learning_rate: float) -> None:
        """One update from the gradients, which are freed; what has none (any more) stays as it is."""
        at_hand = self.gradients()
        self._update([self._slots[name] for name in at_hand], learning_rate)
        self._norms.clear()
        self._scale, self._rate = 1.0, None

    @torch.no_grad()
    def _update(self, slots: list[Slot], learning_rate: float) -> None:
        groups: dict[Any, list[Slot]] = {}  # what one call of a kernel can take together
        for slot in slots:
            rate = learning_rate * self._factors.get(slot.name, 1.0)
            decay = self.config.weight_decay if slot.name in self._decayed else 0.0
            key = (self._rule(slot.name), rate, decay, slot.weight.device, slot.weight.dtype)
            groups.setdefault(key, []).append(slot)
        for (rule, rate, decay, *_), members in groups.items():
            for slot in members:
                slot.state = slot.state or first_state(rule, slot, self.config.state_bits)
            betas, epsilon = self.config.betas, self.config.epsilon
            RULES[rule](members, Update(rate, decay, betas, epsilon, self._scale, self._seed))

    def _rule(self, name: str) -> str:
        outside = self.config.name == "muon" and name not in self._hidden
        return "adamw" if outside else self.config.name

    def state_bytes(self) -> int:
        """Bytes of masters, states and gradients at hand; the parameters themselves are not counted."""
        count = sum(gradient.nbytes for gradient in self.gradients().values())
        for slot in self._slots.values():
            tensors = slot.tensors()
            if slot.weight is slot.parameter:
                del tensors["master"]
            count += sum(tensor.nbytes for tensor in tensors.values())
        return count

    def saved_bytes(self, name: str) -> float:
        """Bytes for each number of a parameter in `state_tensors` once it was updated, without scales."""
        moments = len(MOMENTS[self._rule(name)])
        return self._slots[name].weight.element_size() + moments * self.config.state_bits / 8

    def state_tensors(self) -> dict[str, Tensor]:
        """What an exact continuation needs: `master.NAME`, and once updated `step.NAME` and the state's.

        `master.NAME` is the weight itself where it has no master. The tensors are the live ones, not copies.
        """
        return {
            f"{kind}.{name}": tensor
            for name, slot in self._slots.items()
            for kind, tensor in slot.tensors().items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state_tensors` gave, bit for bit; other names are left alone.

        ValueError where it is of another model, or was made with other settings.
        """
        for name, slot in self._slots.items():
            slot.state, slot.count = {}, 0
            if f"step.{name}" in tensors:
                slot.count = int(tensors[f"step.{name}"])
                slot.state = first_state(self._rule(name), slot, self.config.state_bits)
        expected = self.state_tensors()
        found = {name for name in tensors if name.partition(".")[0] in KINDS}
        if strange := expected.keys() ^ found:
            masters = [name for name in strange if name.startswith("master.")]
            what = "of another model" if masters else "made with other settings of the optimizer"
            raise ValueError(f"the state is {what}: {min(masters or strange)} is on one side only")
        for key, mine in expected.items():
            saved = tensors[key]
            if (saved.shape, saved.dtype) != (mine.shape, mine.dtype):
                raise ValueError(f"{key.partition('.')[2]} has {_form(mine)}, in the state {_form(saved)}")
            mine.copy_(saved)
        for slot in self._slots.values():
            slot.show()


def _hook(optimizer: "weakref.ref[Optimizer]", name: str) -> Callable[[Tensor], None]:
    """For a parameter: gives its gradient to its optimizer. A weak reference, so that both can be freed."""

    def receive(_: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive.receive(name)

    return receive


def _norms(slots: list[Slot]) -> list[Tensor]:
    """Norms of their gradients' parts: a CPU's float32 norm of 30 million numbers is 0.2% too small."""
    parts: list[Tensor] = []
    for slot in slots:
        assert slot.gradient is not None
        parts += slot.gradient.view(-1).split(NORM_PART[slot.gradient.device.type])
    return list(torch._foreach_norm(parts, 2, dtype=torch.float32)) if parts else []


def _form(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def matrix_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: two or more dimensions, no bias, no embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in embeddings
    ]
