"""`ropewalk parity`: does a recipe's layout train what one process trains? On a shallow copy of its model.

Both do the same few optimizer steps in float32, on random weights of the model's own width and the recipe's
own data, adapter and optimizer. Losses and gradient norms must agree; of every part of every block the values
and their gradients are summed over all tokens, wherever those are, so that the first that differs is known.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.data import prepare
from ropewalk.errors import UserError
from ropewalk.layout import DEGREES
from ropewalk.model import ModelConfig, Transformer, from_config, save_model
from ropewalk.parallel import World, started
from ropewalk.recipe import Recipe, load_recipe, resolve
from ropewalk.train.build import config_of, load_run_tokenizer
from ropewalk.train.job import Job, open_job
from ropewalk.train.loop import compute
from ropewalk.train.together import together

STEPS, LEAST_BLOCKS, MOST_TOKENS = 5, 2, 512
LOSS, NORM, PART = 1e-5, 1e-4, 1e-4
"""Largest relative differences: of losses, of gradient norms, of what a part of a block makes."""


@dataclass
class Steps:
    """What one layout computed."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    """of each part of a block in the first step: the sum of squares, and of a projection"""
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    """the same of the loss's gradient there"""


@dataclass(frozen=True)
class Parity:
    """How far a layout is from one process."""

    layout: str
    steps: int
    blocks: int
    loss_difference: float
    gradient_norm_difference: float
    first_different: str | None
    """the part of a block in which it begins; None where all agree"""

    @property
    def same(self) -> bool:
        return self.loss_difference <= LOSS and self.gradient_norm_difference <= NORM

    def __str__(self) -> str:
        found = (
            f"losses differ by {self.loss_difference:.1e} (allowed {LOSS:g}), gradient norms by "
            f"{self.gradient_norm_difference:.1e} (allowed {NORM:g}); {self.steps} steps, "
            f"{self.blocks} blocks, float32"
        )
        if self.same:
            return f"{self.layout} trains what one process trains: {found}"
        where = self.first_different or "no part of a block: look at embedding, head and loss"
        return f"{self.layout} does not train what one process trains: it begins in {where}; {found}"


def parity(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Parity:
    """Trains a shallow copy of a recipe's model in its layout and in one process, and compares.

    The layout's processes are started here, on this machine. UserError for a recipe with one process only.
    """
    from ropewalk.train.entry import layout_of

    resolved = resolve(load_recipe(recipe, overrides)).recipe
    degrees = {name: getattr(resolved.parallel, name) for name in DEGREES}
    shown = degrees | {"expert": resolved.parallel.expert}
    said = " x ".join(f"{name} {degree}" for name, degree in shown.items() if degree > 1)
    if not said:
        raise UserError("parity: the recipe has one process; say which layout, as in parallel.tensor=2")
    if started():
        raise UserError("parity: starts the processes itself; do not start it by torchrun")
    with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
        config = shallow(config_of(resolved), layout_of(resolved).stages)
        small = reduced(resolved, config, Path(folder))
        one = small.model_copy(update={"parallel": small.parallel.model_copy(update=dict.fromkeys(shown, 1))})
        alone = parity_steps(one.model_dump(mode="json"))
        processes = math.prod(degrees.values())
        arguments = [small.model_dump(mode="json")]
        found = together("parity_steps", arguments, processes, 0, folder, resolved.name)
    return compared(said, config.num_hidden_layers, alone, Steps(**found))


def shallow(config: ModelConfig, least: int = LEAST_BLOCKS) -> ModelConfig:
    """The fewest blocks, two or `least` at least, among which each kind of them is."""
    kinds = [(config.window(i), i in config.moe_layers) for i in range(config.num_hidden_layers)]
    count = min(max(least, LEAST_BLOCKS), len(kinds))
    while set(kinds[:count]) != set(kinds):
        count += 1
    experts = tuple(layer for layer in config.moe_layers if layer < count)
    return replace(
        config, num_hidden_layers=count, layer_types=config.layer_types[:count], moe_layers=experts
    )


def reduced(recipe: Recipe, config: ModelConfig, folder: Path) -> Recipe:
    """The resolved recipe on random weights of that shape, kept in `folder`: float32, few and short rows."""
    save_model(from_config(config, recipe.seed), load_run_tokenizer(recipe), folder / "model")
    parts = recipe.parallel.replicate * recipe.parallel.shard
    optimizer = recipe.train.optimizer.model_copy(update={"masters": True})
    micro_batches = max(2, recipe.parallel.pipeline)
    whole = 2 * recipe.parallel.context * recipe.parallel.tensor
    length = min(recipe.data.sequence_length, MOST_TOKENS // whole * whole)
    train = {
        "precision": "float32",
        "compile": False,
        "cuda_graphs": False,
        "self_check": False,
        "epochs": None,
    }
    train |= {"steps": STEPS, "tokens": None, "batch_size": micro_batches * parts, "optimizer": optimizer}
    train["micro_batch_size"] = 2 if optimizer.in_backward else 1
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"source": str(folder / "model"), "config": None, "revision": None, "tokenizer": None}
            ),
            "data": recipe.data.model_copy(update={"sequence_length": length}),
            "train": recipe.train.model_copy(update=train),
        }
    )


def parity_steps(recipe: Mapping[str, Any]) -> Steps:
    """The steps of a reduced recipe in the layout of the processes that there are."""
    from ropewalk.train.entry import layout_of

    checked = resolve(load_recipe(recipe)).recipe
    world = World.join(checked.train.device, layout_of(checked))
    prepared = prepare(checked) if world.first else None
    world.wait()
    job = open_job(checked, (prepared or prepare(checked)).train, None, world=world)
    found = Steps()
    watched = Watched(job.built.model, job.built.whole)
    for job.step in range(1, STEPS + 1):
        loss, norm = _step(job)
        found.losses.append(loss)
        found.gradient_norms.append(norm)
        if job.step == 1:
            found.values, found.gradients = watched.sums(world)
    return found


def _step(job: Job) -> tuple[float, float]:
    """Loss and gradient norm of an optimizer step. (Rows keep their padding: layouts cut it differently.)"""
    first = (job.step - 1) * job.rows + job.world.part * job.own_rows
    batch = job.loader.batch(first, job.own_rows)
    (scored,) = job.world.total([int((batch.labels != -100).sum())])
    rate = job.learning_rate()
    job.optimizer.begin(rate)
    *sums, norm = compute(job, job.micro_batches(batch), int(scored))
    job.optimizer.step(rate)
    return job.world.total_of_tokens([math.fsum(sums) / scored])[0], norm


class Watched:
    """Sums over the tokens that a process has, of what each block and each part of it gives to the next."""

    def __init__(self, model: Transformer, whole: Transformer) -> None:
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._handles = []
        for number, block in whole.blocks.named_children():
            parts = [f"blocks.{number}.{name}" for name, _ in block.named_children()]
            for name in (*parts, f"blocks.{number}"):
                self.values[name], self.gradients[name] = torch.zeros(2, 2, dtype=torch.float64)
        for name, part in model.named_modules():
            if name in self.values:
                self._handles.append(part.register_forward_hook(self._seen(name)))

    def _seen(self, name: str) -> Any:
        def seen(_: nn.Module, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not value.requires_grad:
                return
            self.values[name] += _sums(value)

            seen_before: list[bool] = []  # gradients of weights may be made apart, and pass here once more

            def gradient(slope: Tensor) -> None:
                if not seen_before:
                    self.gradients[name] += _sums(slope)
                seen_before.append(True)

            value.register_hook(gradient)

        return seen

    def sums(self, world: World) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
        """Over all processes. Nothing is watched any more."""
        for handle in self._handles:
            handle.remove()
        both = []
        for mine in (self.values, self.gradients):
            numbers = iter(world.everywhere([n for pair in mine.values() for n in pair.tolist()]))
            both.append({name: (next(numbers), next(numbers)) for name in mine})
        return both[0], both[1]


def _sums(value: Tensor) -> Tensor:
    """Of squares, and of the numbers times a fixed random vector along the last dimension: `[2]` float64."""
    wide = value.detach().double().cpu()
    draw = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack((wide.square().sum(), (wide @ draw).sum()))


def compared(layout: str, blocks: int, alone: Steps, found: Steps) -> Parity:
    """The differences of a layout's steps from those of one process."""

    def apart(mine: list[float], other: list[float]) -> float:
        return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(mine, other, strict=True))

    losses = apart(found.losses, alone.losses)
    norms = apart(found.gradient_norms, alone.gradient_norms)
    where = None
    if not (losses <= LOSS and norms <= NORM):
        forward = (f"the values of {n}" for n in alone.values if _differ(found.values[n], alone.values[n]))
        backward = (
            f"the gradients of what {n} gives"
            for n in reversed(alone.gradients)
            if _differ(found.gradients[n], alone.gradients[n])
        )
        where = next(forward, None) or next(backward, None)
    return Parity(layout, len(found.losses), blocks, losses, norms, where)


def _differ(mine: Sequence[float], other: Sequence[float]) -> bool:
    square, projection = (abs(a - b) for a, b in zip(mine, other, strict=True))
    return not (
        square <= PART * abs(other[0]) and projection <= PART * max(math.sqrt(other[0]), abs(other[1]))
    )
