"""`plan`: what a recipe's run will take, whether it fits, what would be better; and how well that came
true."""

import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ropewalk.data.entry import folder_slug
from ropewalk.errors import UserError
from ropewalk.layout import DEGREES
from ropewalk.plan.calibration import calibration, corrected
from ropewalk.plan.estimates import Estimate, point
from ropewalk.plan.hardware import Cluster, cluster
from ropewalk.plan.here import default_processes, here, plain
from ropewalk.plan.search import By, Fix, Vary, fixes, search
from ropewalk.plan.sizes import parameters
from ropewalk.plan.work import Rows, Work, work_of
from ropewalk.recipe import Machine, Recipe, load_recipe, resolve
from ropewalk.track import RunDirectory, list_runs
from ropewalk.train.build import config_of
from ropewalk.train.entry import layout_of

PLAN = "plan.json"
"""What a run foresaw, in its directory."""


@dataclass(frozen=True)
class Plan:
    """What a run will take, and how it could be done better."""

    recipe: str
    parameters: int
    run: Estimate
    """as the recipe has it"""
    steps: int | None
    """None where the recipe counts epochs of data that are not prepared"""
    data: Path | None
    """prepared data that say lengths and scored tokens; without, a row is one document, all scored"""
    ranked: list[Estimate]
    """other layouts of the same step, best first; none fits where there is none"""
    fixes: list[Fix]
    """changes that would make it fit; none where it does"""

    @property
    def seconds(self) -> float | None:
        """Of all steps; without start, validation and checkpoints."""
        return None if self.steps is None else self.steps * self.run.step_seconds

    @property
    def dollars(self) -> float | None:
        price = self.run.dollars_per_hour
        return None if price is None or self.seconds is None else price * self.seconds / 3600


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    on: str | Path | Cluster | None = None,
    network: str | None = None,
    by: By = "time",
    vary: Collection[Vary] = (),
) -> Plan:
    """What a recipe's run takes on this machine, or on a cluster (`8xH100`, a file); better layouts; fixes.

    vary: the layouts are searched in other precisions ("precision"), or with adapters and without
    ("adaptation"), too: what is trained is then not the same. Nothing is started and no weights are read.
    UserError for what the recipe has wrong, for a cluster that is not known, and for a layout that the model
    cannot be divided in.
    """
    where = None if on is None else cluster(on, network)
    machine = Machine.here() if where is None else _machine(where)
    whole = resolve(load_recipe(recipe, overrides), machine=machine).recipe
    layout = layout_of(whole)  # refuses what the model cannot be divided in
    if where is None:
        processes = max(default_processes(), layout.processes)
        where = here(processes, whole.train.precision, whole.train.device)
    config = config_of(whole)
    folder, rows = _prepared(whole)
    work = work_of(whole, config, where.devices, rows)
    where = where.ours()
    run = point(work, where)
    return Plan(
        whole.name,
        parameters(config),
        run,
        _steps(whole, work, rows),
        folder,
        search(work, where, by, accept=_trainable(recipe, overrides, machine), vary=vary),
        [] if run.fits else fixes(work, where),
    )


def propose(recipe: Recipe, processes: int) -> list[str]:
    """The best layout of a run on so many processes like this one, as overrides; none where nothing fits.

    All processes come to the same: it rests on what the device is, not on what is free or was measured here.
    """
    machine = replace(Machine.here(), processes=processes)
    whole = resolve(recipe, machine=machine).recipe
    work = work_of(whole, config_of(whole), processes)
    where = plain(processes, work.device).ours()
    found = search(work, where, count=1, accept=_trainable(recipe, (), machine))
    return spread(found[0].work) if found else []


def _trainable(
    recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str], machine: Machine
) -> Callable[[Work], bool]:
    """Whether the recipe would be trained in the layout of a Work, for all that it says besides."""

    def trainable(work: Work) -> bool:
        there = replace(machine, processes=work.layout.processes)
        try:
            changed = load_recipe(recipe, [*overrides, *as_overrides(work)])
            layout_of(resolve(changed, machine=there).recipe)
        except UserError:
            return False
        return True

    return trainable


def as_overrides(work: Work) -> list[str]:
    """What the recipe says of how a step is spread, and of all that a search may vary, as overrides."""
    kind = (
        f"train.precision={work.precision}",
        f"adapt.method={work.method}",
        f"adapt.quantize={work.quantize}",
    )
    return [*spread(work), *kind]


def spread(work: Work) -> list[str]:
    """What the recipe says of how a step is spread, as overrides."""
    layout = work.layout
    degrees = {name: getattr(layout, name) for name in (*DEGREES, "expert")}
    if layout.parts > 1:
        degrees["stage"] = layout.stage
    if layout.pipeline > 1:
        degrees |= {"pipeline_schedule": layout.pipeline_schedule, "pipeline_stages": layout.stages_each}
    return [
        *(f"parallel.{name}={value}" for name, value in degrees.items()),
        *(["train.optimizer.offload=true"] if work.offload else []),
        f"train.micro_batch_size={work.micro_batch_size}",
        f"train.checkpointing={work.checkpointing}",
    ]


def _machine(where: Cluster) -> Machine:
    """What `auto` in a recipe rests on, of a machine that is not this one."""
    gpu = not where.accelerator.name.startswith("CPU")
    has = "bfloat16" in where.accelerator.peak
    return Machine(
        cores=16,
        cpu_bfloat16=where.accelerator.name == "CPU-AMX",
        gpu=gpu,
        gpu_bfloat16=gpu and has,
        processes=where.devices,
        local_processes=where.per_node,
    )


def _prepared(recipe: Recipe) -> tuple[Path | None, Rows | None]:
    """The newest data prepared from the recipe's first source in rows of its length. (Which sources and rules
    it was made from is not compared: that would mean to read them all.)"""
    data = recipe.data
    slug = folder_slug(data.train[0].name or PurePath(data.train[0].path).name)
    accounts = [p for p in Path(data.directory).glob(f"{slug}-*/prepared.json") if p.is_file()]
    for account in sorted(accounts, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            report = json.loads(account.read_text(encoding="utf-8"))["report"]
            if report["sequence_length"] == data.sequence_length:
                return account.parent, Rows.of(report["train"], data.packing, data.sequence_length)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # it is damaged, or of another version: `prepare` will say so
    return None, None


def _steps(recipe: Recipe, work: Work, rows: Rows | None) -> int | None:
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return max(1, round(train.tokens / work.step_tokens))
    if rows is None or train.epochs is None or train.batch_size is None:
        return None
    return max(1, math.ceil(train.epochs * rows.rows / train.batch_size))


# The loop closed: what a run foresaw is kept beside what it measured.


def foreseen(recipe: Recipe, processes: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the planner says of a run that is about to start here, as it is kept in the run's directory.

    `report` is that of its prepared data.
    """
    rows = Rows.of(report["train"], recipe.data.packing, recipe.data.sequence_length)
    work = work_of(recipe, config_of(recipe), processes, rows)
    where = here(processes, recipe.train.precision, work.device).ours()
    run = point(work, where)
    return {
        "device": where.accelerator.name,
        "calibrated": where.accelerator.calibrated,
        "precision": work.precision,
        "step_seconds": run.step_seconds,
        "phases": run.time.phases,
        "memory_bytes": run.memory.total_bytes,
        "memory_terms": run.memory.terms,
        "before_bytes": _resident() if work.device == "cpu" else 0,
    }


def _resident() -> int:
    """Bytes of this process in memory: on a CPU what a run holds comes on top."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Outcome:
    """Of one quantity of a run, what was foreseen and what was measured."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def outcomes(run: RunDirectory) -> list[Outcome]:
    """Of a run that stored its plan and has done steps: seconds (medians) and bytes. None of another.

    On a CPU the bytes held are those of the process, less what it held before.
    """
    said, records = run.read_json(PLAN), list(run.read())
    steps = [record for record in records if record["kind"] == "train"]
    if said is None or not steps:
        return []
    later = steps[1:] or steps  # the first one does things that are done once
    update = said["phases"].get("optimizer", 0.0)
    found = [
        ("seconds a step", said["step_seconds"], _median(later, "seconds")),
        ("seconds of passes", said["step_seconds"] - update, _median(later, "compute_seconds")),
        ("seconds of the update", update, _median(later, "update_seconds")),
    ]
    terms, held = said["memory_terms"], next((r for r in records if r["kind"] == "memory"), {})
    weights = sum(size for name, size in terms.items() if name.startswith("weights"))
    states = terms.get("optimizer states", 0) + terms.get("masters", 0)
    peak = max(record["peak_memory_bytes"] for record in steps) - said["before_bytes"]
    found += [
        ("bytes of weights", weights, held.get("weight_bytes", 0)),
        ("bytes of states", states, held.get("state_bytes", 0)),
        ("bytes held", said["memory_bytes"], peak),
    ]
    return [Outcome(*one) for one in found if one[2] > 0]


def _median(records: list[dict[str, Any]], name: str) -> float:
    return statistics.median(record.get(name, 0.0) for record in records)


def learn(run: RunDirectory, found: Sequence[Outcome]) -> None:
    """Lets the machine's calibration take a finished run into account; `found`: its `outcomes`."""
    said = run.read_json(PLAN)
    if said is None or not said["calibrated"]:
        return
    if (known := calibration(said["device"])) is None:
        return
    for one in found:
        if one.what == "seconds a step":
            corrected(known, said["precision"], one.measured, one.predicted).save()


def accuracy(folder: str | Path = "runs") -> list[tuple[Path, Outcome]]:
    """The history: each finished run's outcomes, oldest first. UserError where no run has a plan."""
    found = [
        (Path(summary.path), one)
        for summary in list_runs(Path(folder))
        for one in outcomes(RunDirectory.open(summary.path))
    ]
    if not found:
        raise UserError(f"{folder}: no run here has a plan and a step; train one first")
    return found


def as_json(made: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        **{name: getattr(made, name) for name in ("recipe", "parameters", "steps", "seconds", "dollars")},
        "run": estimate_json(made.run),
        "ranked": [estimate_json(one) for one in made.ranked],
        "fixes": [asdict(fix) for fix in made.fixes],
    }


def estimate_json(one: Estimate) -> dict[str, Any]:
    """An estimate as plain values."""
    names = "micro_batch_size accumulation checkpointing precision method quantize".split()
    return {
        "cluster": str(one.cluster),
        "devices": one.cluster.devices,
        "layout": asdict(one.layout),
        **{name: getattr(one.work, name) for name in names},
        "step_seconds": one.step_seconds,
        "phases": one.time.phases,
        **{name: getattr(one, name) for name in ("tokens_per_second", "mfu", "mfu_causal", "hfu", "fits")},
        "memory": asdict(one.memory),
        "sent": one.sent,
        "dollars_per_hour": one.dollars_per_hour,
    }
