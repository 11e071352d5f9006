"""Fill in what a recipe leaves open, and say of every value where it comes from and why it is what it is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from ropewalk.errors import UserError
from ropewalk.layout import DEGREES, REST, Layout
from ropewalk.recipe.conflicts import refuse_conflicts
from ropewalk.recipe.document import Origin
from ropewalk.recipe.loader import load_with_origins
from ropewalk.recipe.machine import Machine
from ropewalk.recipe.schema import Recipe, Section

Derived = dict[str, tuple[Any, str]]
"""Dotted name -> (value, why)."""

LEARNING_RATES = {
    "lora": 2e-4,
    "dora": 2e-4,
    "bottleneck": 2e-4,
    "ia3": 3e-3,
    "prompt": 3e-1,
    "prefix": 1e-2,
    "bitfit": 1e-3,
    "full": 2e-5,
}
FROM_SCRATCH = 6e-4
OPTIMIZERS = {"muon": 1.0, "lion": 0.2, "adafactor": 1.0, "adamw": 1.0}
"""Learning rates beside AdamW's: Lion's steps are signs and want a third to a tenth (arXiv 2302.06675)."""
BETAS = {"adamw": (0.9, 0.95), "lion": (0.9, 0.99), "muon": (0.95, 0.95), "adafactor": (0.9, 0.95)}


@dataclass(frozen=True)
class Resolved:
    """A recipe with nothing left open that can be known before the data is read.

    `origins` has an entry for every leaf, by dotted name (`data.train.0.path`).
    What remains None is either truly absent or found in the data, as its origin says.
    """

    recipe: Recipe
    origins: dict[str, Origin]


def resolve(
    recipe: Recipe, origins: Mapping[str, Origin] | None = None, machine: Machine | None = None
) -> Resolved:
    """Fill every derived field of a recipe.

    `origins` is what `load_with_origins` found; without it, whatever was set counts as given.
    `machine` is the one to derive for; by default this one. The resolved recipe reloads to itself.
    """
    derived = _derive(recipe, machine or Machine.here())
    values = recipe.model_dump()
    for name, (value, _) in derived.items():
        _set(values, name.split("."), value)
    resolved = Recipe.model_validate(values)
    refuse_conflicts(resolved)
    given = origins if origins is not None else load_with_origins(recipe)[1]
    found: dict[str, Origin] = {}
    for name, value in leaves(resolved):
        if name in derived:
            found[name] = Origin("derived", given[name].where if name in given else "", derived[name][1])
        elif name in given:
            found[name] = given[name]
        else:
            found[name] = Origin("default", why=_later(name, value))
    return Resolved(resolved, found)


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a recipe with its dotted name, in the order of the schema."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for i, item in enumerate(value):
                yield from leaves(item, f"{prefix}{name}.{i}.")
        else:
            yield f"{prefix}{name}", value


def _set(values: Any, parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        values = values[int(part)] if part.isdigit() else values[part]
    values[parts[-1]] = value


def _derive(recipe: Recipe, machine: Machine) -> Derived:
    found: Derived = {}
    if recipe.model.tokenizer is None:
        found["model.tokenizer"] = (recipe.model.source, "model.source")
    for kind in ("train", "validation"):
        for i, source in enumerate(getattr(recipe.data, kind)):
            if source.name is None:
                found[f"data.{kind}.{i}.name"] = (PurePath(source.path).name, "the last part of its path")
    if recipe.data.workers == 0:
        found["data.workers"] = (machine.cores, "the cores of this machine")
    if recipe.adapt.alpha is None and recipe.adapt.method in ("lora", "dora"):
        found["adapt.alpha"] = (2.0 * recipe.adapt.rank, "2 x adapt.rank")
    found |= _derive_train(recipe, machine)
    window = recipe.evaluate.window or recipe.data.sequence_length
    if recipe.evaluate.window is None:
        found["evaluate.window"] = (window, "data.sequence_length")
    if recipe.evaluate.stride is None:
        found["evaluate.stride"] = (max(1, window // 2), "half of evaluate.window")
    return found


def _derive_train(recipe: Recipe, machine: Machine) -> Derived:
    train, found = recipe.train, Derived()
    device = train.device
    if device == "auto":
        device = "cuda" if machine.gpu else "cpu"
        found["train.device"] = (
            device,
            "a usable GPU was found" if machine.gpu else "no usable GPU was found",
        )
    if train.precision == "auto":
        fast = machine.gpu_bfloat16 if device == "cuda" else machine.cpu_bfloat16
        what = "GPU" if device == "cuda" else "CPU"
        reason = f"this {what} {'computes in' if fast else 'has no'} bfloat16"
        found["train.precision"] = ("bfloat16" if fast else "float32", reason)
    if train.optimizer.learning_rate is None:
        found["train.optimizer.learning_rate"] = _learning_rate(recipe)
    for name, value in zip(("beta1", "beta2"), BETAS[train.optimizer.name], strict=True):
        if getattr(train.optimizer, name) is None:
            found[f"train.optimizer.{name}"] = (value, f"train.optimizer.name is {train.optimizer.name}")

    rows = train.batch_size
    if train.batch_tokens is not None:
        rows = max(1, round(train.batch_tokens / recipe.data.sequence_length))
        why = f"train.batch_tokens ({train.batch_tokens:,}) / data.sequence_length"
        found["train.batch_size"] = (rows, why)
        found["train.batch_tokens"] = (None, "became train.batch_size")
    elif rows is None:
        rows = 8
        found["train.batch_size"] = (rows, "8 rows unless told")
    layout, why = _layout(recipe, machine)
    for name in (*DEGREES, "expert"):
        if getattr(recipe.parallel, name) == REST:
            found[f"parallel.{name}"] = (getattr(layout, name), why)
    if train.threads == 0:
        found["train.threads"] = _threads(layout, machine)
    mine, odd = divmod(rows, layout.data)
    if odd:
        raise UserError(
            f"train.batch_size: {rows} rows cannot be shared out among {layout.data} processes; "
            f"choose a multiple of {layout.data}"
        )
    if train.micro_batch_size is None:
        found["train.micro_batch_size"] = _micro_batch(mine, recipe.data.sequence_length, device, layout)
    elif mine % train.micro_batch_size:
        each = f", {mine} for each process" if layout.data > 1 else ""
        raise UserError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the batch of {rows} rows "
            f"(train.batch_size{each}); choose a divisor of it"
        )
    if train.schedule.warmup_steps is None:
        steps, reason = train.steps, "train.steps"
        if train.tokens is not None:
            steps = math.ceil(train.tokens / (rows * recipe.data.sequence_length))
            reason = f"the {steps:,} steps of train.tokens"
        if steps is not None:
            warmup = round(steps * train.schedule.warmup_fraction)
            found["train.schedule.warmup_steps"] = (warmup, f"train.schedule.warmup_fraction of {reason}")
    return found


def _layout(recipe: Recipe, machine: Machine) -> tuple[Layout, str]:
    """What the processes that there are make of the recipe's degrees, or how many those ask for."""
    layout = Layout(**{field.name: getattr(recipe.parallel, field.name) for field in fields(Layout)})
    if machine.processes is None:
        return layout.over(layout.processes), "no more processes than the other degrees ask for"
    return layout.over(machine.processes), f"the rest of {machine.processes} processes"


def _threads(layout: Layout, machine: Machine) -> tuple[int, str]:
    """Processes of one machine share its cores: threads that wait for a core slow all of them down."""
    local = layout.processes if machine.processes is None else machine.local_processes or 1
    shared = f", shared out among {local} processes" if local > 1 else ""
    return max(1, machine.cores // local), f"the cores of this machine{shared}"


def _learning_rate(recipe: Recipe) -> tuple[float, str]:
    if recipe.model.config is not None:
        rate, why = FROM_SCRATCH, "model.config: from scratch"
    else:
        rate, why = LEARNING_RATES[recipe.adapt.method], f"adapt.method is {recipe.adapt.method}"
    factor = OPTIMIZERS[recipe.train.optimizer.name]
    if factor != 1.0:
        why += f", {factor:g} of it for {recipe.train.optimizer.name}"
    return rate * factor, why


def _micro_batch(rows: int, sequence_length: int, device: str, layout: Layout) -> tuple[int, str]:
    limit = 8192 if device == "cuda" else 2048
    most = max(1, limit // sequence_length)
    fits = [n for n in range(1, min(rows, most) + 1) if rows % n == 0]
    where = "a GPU" if device == "cuda" else "a CPU"
    why = f"largest divisor of the batch up to {limit:,} tokens on {where}"
    if layout.pipeline > 1:
        why += f" that makes micro-batches enough for {layout.pipeline_schedule}"
        # four micro-batches for each process, so that they wait for each other a fifth of the time at most
        enough = [n for n in fits if layout.takes(rows // n)] or fits
        fits = [n for n in enough if rows // n >= 4 * layout.pipeline] or enough[:1]
    return max(fits), why


def _later(name: str, value: Any) -> str:
    """What decides a value that no recipe can know."""
    if name.startswith("data.") and name.rpartition(".")[2] in ("text", "messages", "prompt", "completion"):
        return "found in the file"
    if name in ("data.too_long", "data.score") and value == "auto":
        return "decided for each document"
    if name == "train.schedule.warmup_steps" and value is None:
        return "train.schedule.warmup_fraction of the steps that train.epochs comes to"
    if name == "parallel.pipeline_stages":
        return "as few as the schedule allows"
    if name == "evaluate.base" and not value:
        return "the same as evaluate.tasks"
    return ""
