"""`train` and `resume`: from a recipe or a run directory to a finished run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ropewalk.adapt import left_out
from ropewalk.data import DamagedDataError, TokenShards, prepare
from ropewalk.errors import UserError
from ropewalk.files import cache_directory, remove_leftovers
from ropewalk.layout import Layout
from ropewalk.parallel import World, context_refusal, expert_refusal, pipeline_refusal, refusal, started
from ropewalk.parallel.preflight import meet
from ropewalk.recipe import Machine, Planned, Recipe, load_recipe, resolve, to_yaml
from ropewalk.track import RunDirectory, environment
from ropewalk.track.environment import versions
from ropewalk.train.build import config_of
from ropewalk.train.checkpoint import list_checkpoints, newest_valid_checkpoint
from ropewalk.train.goodput import left_behind, note_end, note_start
from ropewalk.train.job import Job, lineage, model_identity, open_job
from ropewalk.train.loop import run_loop
from ropewalk.train.passes import stated, warnings
from ropewalk.train.progress import Reporter
from ropewalk.train.report import write_report
from ropewalk.train.signals import StopRequest
from ropewalk.train.together import job_key, run_of, together
from ropewalk.train.watchdog import Watchdog

RESPREAD = ("parallel.", "train.micro_batch_size", "train.threads")
"""Fields of a recipe that change where a run is computed, and not what."""
SURVIVAL = ("train.spike.", "train.verify_every")
"""Fields that say what is done about what goes wrong: a run that stopped for it may go on in another way."""


@dataclass(frozen=True)
class TrainResult:
    """What became of a run. Losses are means per scored token; None where nothing was measured."""

    run: Path
    step: int
    steps: int
    interrupted: bool
    preempted: bool
    """interrupted by SIGUSR1 or SIGUSR2: to be started again"""
    losses: list[float]
    """of the steps done by this call, less those whose update was skipped"""
    validation_before: float | None
    validation_after: float | None
    checkpoint: Path | None
    """the newest"""
    tokens_per_second: float
    """padding, evaluation and checkpoints excluded"""
    peak_memory_bytes: int


def train(
    recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str] = (), progress: bool = True
) -> TrainResult:
    """Prepares the data, trains, and leaves a run directory under `recipe.runs`.

    A stop by a signal is no error: the result says `interrupted`, and `resume` goes on.
    Raises UserError for what the recipe has wrong and RopewalkError for what fails on the way.
    """
    began = time.time()
    recipe = anchored(resolve(planned(load_recipe(recipe, overrides))).recipe)
    layout = layout_of(recipe)
    if layout.processes > 1 and not started():
        return _together("train", [recipe.model_dump(mode="json"), [], progress], recipe)
    world = meet(recipe.train.device, layout, Path(recipe.runs), versions)
    begun = world.share(run_of(job_key(), recipe.runs, recipe.name) if world.first else None)
    if begun is not None:  # the processes of this job were started again
        before = load_recipe(begun / "recipe.yaml")
        spread = {
            "train": before.train.model_copy(update={"micro_batch_size": recipe.train.micro_batch_size})
        }
        recipe = before.model_copy(update={"parallel": recipe.parallel, **spread})
        return _go_on(RunDirectory(begun, writes=world.first), recipe, world, progress, began)
    prepared = prepare(recipe) if world.first else None
    world.wait()
    if prepared is None:
        prepared = prepare(recipe)  # the first one has done the work
    from ropewalk.plan import PLAN, foreseen  # it knows the training step, which so comes first

    ahead = foreseen(recipe, world.size, prepared.report) if world.first else {}
    job = open_job(recipe, prepared.train, prepared.validation, world=world)
    if world.first:
        job.check_room(Path(recipe.runs))
        run = RunDirectory.create(recipe.runs, recipe.name, to_yaml(recipe), lineage(recipe, prepared))
        run.write_json("environment.json", environment(**facts(job), job=job_key()))
        run.write_json(PLAN, ahead)
        world.share(str(run.path))
    else:
        run = RunDirectory(Path(world.share(None)), writes=False)
    with run.lock():
        note_start(run, began, 0.0, {})
        return finish(job, run, Reporter(progress and world.first))


def resume(run: str | Path, overrides: Sequence[str] = (), progress: bool = True) -> TrainResult:
    """Finishes an interrupted run, bit for bit as if it had never stopped, from its newest whole checkpoint.

    `overrides` may change how it is spread (`parallel.shard=4`), which changes sums in their last bits only,
    and what is done about spikes (`train.spike.policy=skip`).

    Its metrics after that checkpoint are dropped and made again. Damaged checkpoints are skipped, and said.
    A run that is finished is left as it is.
    """
    began, directory = time.time(), RunDirectory.open(run)
    for word in overrides:
        if not word.startswith(RESPREAD + SURVIVAL):
            raise UserError(
                f"{word}: a run goes on as it began; only {', '.join(RESPREAD + SURVIVAL)}... can be changed"
            )
    recipe = resolve(load_recipe(directory.path / "recipe.yaml", overrides)).recipe
    layout = layout_of(recipe)
    if layout.processes > 1 and not started():
        return _together("resume", [str(directory.path), list(overrides), progress], recipe)
    world = meet(recipe.train.device, layout, directory.path, versions)
    directory.writes = world.first
    return _go_on(directory, recipe, world, progress, began)


def _go_on(
    directory: RunDirectory, recipe: Recipe, world: World, progress: bool, began: float
) -> TrainResult:
    reporter = Reporter(progress and world.first)
    with directory.lock():
        checkpoint: Path | None = None
        if world.first:
            for folder in (directory.path, directory.samples_path, directory.checkpoints_path):
                remove_leftovers(folder)
            checkpoint, warnings = newest_valid_checkpoint(directory.path)
            for warning in warnings:
                reporter.warn(warning)
        checkpoint = world.share(checkpoint)
        check_unchanged(directory, recipe, reporter)
        job = open_job(recipe, *same_data(directory, recipe), checkpoint, world)
        left = left_behind(directory)
        for record in directory.truncate(job.step):
            if record["kind"] == "validation":
                job.validation_losses[record["step"]] = record["loss"]
            if record["kind"] == "rollback":  # which may be younger than the checkpoint
                job.spikes.left_out = record["left_out"]
        if job.step == job.steps and (directory.path / "report.md").exists():
            reporter.say(f"{directory.path}: all {job.steps} steps are done; nothing to do")
            return result_of(job, directory, [])
        if world.first:
            job.check_room(directory.checkpoints_path)
        note_start(directory, began, job.meter.train_seconds, left)
        return finish(job, directory, reporter)


def planned(recipe: Recipe) -> Recipe:
    """With `parallel: auto`, the layout that the planner finds best for the processes or GPUs here."""
    processes = Machine.here().processes or (torch.cuda.device_count() if recipe.train.device != "cpu" else 1)
    if not isinstance(recipe.parallel, Planned) or processes == 1:
        return recipe
    from ropewalk.plan import propose

    return load_recipe(recipe, propose(recipe, processes))


def layout_of(recipe: Recipe) -> Layout:
    """The layout of a resolved recipe. UserError where its model cannot be divided so."""
    layout = Layout(**{field.name: getattr(recipe.parallel, field.name) for field in fields(Layout)})
    if layout.tensor > 1 and (why := refusal(config_of(recipe), layout.tensor)):
        raise UserError(f"parallel.tensor: {why}")
    if layout.context > 1 and (why := context_refusal(config_of(recipe), layout)):
        raise UserError(f"parallel.context: {why}")
    if layout.pipeline > 1 and (why := pipeline_refusal(config_of(recipe), layout)):
        raise UserError(f"parallel.pipeline: {why}")
    if layout.expert > 1 and (why := expert_refusal(config_of(recipe), layout)):
        raise UserError(f"parallel.expert: {why}")
    return layout


def _together(call: str, arguments: list[Any], recipe: Recipe) -> TrainResult:
    processes, restarts = layout_of(recipe).processes, recipe.parallel.restarts
    values = together(call, arguments, processes, restarts, recipe.runs, recipe.name)
    paths = {name: Path(values[name]) for name in ("run", "checkpoint") if values[name] is not None}
    return TrainResult(**values | paths)


def finish(job: Job, run: RunDirectory, reporter: Reporter) -> TrainResult:
    """Runs the loop to its end or to a stop, and says how it went."""
    trainable, adapted = job.built.trainable, job.built.adapted
    samples = job.steps * job.rows
    sources = stated(job.loader, samples)
    run.log(
        {
            "kind": "start",
            "step": job.step,
            "steps": job.steps,
            "trainable": trainable,
            "time": time.time(),
            **({"sources": job.loader.passes(samples)} if sources else {}),
        }
    )
    what = f"{trainable:,} parameters" + (f" in {len(adapted)} places" if adapted else "")
    epochs = job.loader.epochs(samples)
    reporter.say(
        f"{run.path}: {job.steps} steps of {job.rows} rows ({epochs:.3g} epochs) on {job.device}, "
        f"training {what}" + (f", going on after step {job.step}" if job.step else "")
    )
    if sources:
        reporter.say(f"sources: {sources}")
    for warning in warnings(job.loader, samples) if job.world.first and not job.step else ():
        reporter.warn(warning)
    if adapted and (sentence := left_out(job.built.whole)):
        reporter.say(sentence)
    if job.compile_seconds is not None:
        reporter.say(
            f"compiled the blocks in {job.compile_seconds:.1f} s; {cache_directory()} keeps what can be kept"
        )
        run.log({"kind": "compile", "step": job.step, "seconds": round(job.compile_seconds, 3)})
    if job.checked is not None:
        reporter.say(str(job.checked))
        run.log({"kind": "self_check", "step": job.step, **asdict(job.checked)})
    reporter.start(job.steps, job.step)
    try:
        world = job.world
        watchdog = Watchdog(run.path, world.rank, world.size, job.recipe.parallel.hang_seconds)
        with StopRequest(world) as stop, watchdog as watch:
            job.at = watch.at
            losses = run_loop(job, run, reporter, stop)
        held = {"weight_bytes": job.built.weight_bytes(), "state_bytes": job.optimizer.state_bytes()}
        run.log({"kind": "memory", "step": job.step, **held})
        note_end(run)
    finally:
        reporter.stop()
        run.close()
    result = result_of(job, run, losses, interrupted=bool(stop), preempted=stop.preempted)
    if stop:
        reporter.say(
            f"stopped by {stop.signal} after step {job.step} of {job.steps}; all of it is in "
            f"{result.checkpoint}; go on with: ropewalk resume {run.path}"
        )
    else:
        if job.world.first:
            from ropewalk.plan import learn, outcomes

            found = outcomes(run)
            write_report(job, run, found)
            learn(run, found)
        reporter.say(f"{run.path}: done; see {run.path / 'report.md'}")
    return result


def result_of(
    job: Job, run: RunDirectory, losses: list[float], interrupted: bool = False, preempted: bool = False
) -> TrainResult:
    measured = [job.validation_losses[step] for step in sorted(job.validation_losses)]
    saved = list_checkpoints(run.checkpoints_path)
    return TrainResult(
        run=run.path,
        step=job.step,
        steps=job.steps,
        interrupted=interrupted,
        preempted=preempted,
        losses=losses,
        validation_before=measured[0] if measured else None,
        validation_after=measured[-1] if len(measured) > 1 else None,
        checkpoint=saved[-1] if saved else None,
        tokens_per_second=job.meter.tokens_per_second,
        peak_memory_bytes=job.meter.peak_memory(),
    )


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths to its model, so that the run can be used from any directory."""
    names = {"source": recipe.model.source, "tokenizer": recipe.model.tokenizer}
    local = {key: str(Path(name).absolute()) for key, name in names.items() if name and Path(name).exists()}
    update: dict[str, Any] = {"model": recipe.model.model_copy(update=local)}
    if (template := recipe.data.chat_template) and Path(template).exists():
        absolute = {"chat_template": str(Path(template).absolute())}
        update["data"] = recipe.data.model_copy(update=absolute)
    return recipe.model_copy(update=update)


def facts(job: Job) -> dict[str, Any]:
    """What environment.json says about torch's side of the process."""
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    return {"device": job.device.type, "gpu": gpu, "threads": torch.get_num_threads()}


def same_data(run: RunDirectory, recipe: Recipe) -> tuple[TokenShards, TokenShards | None]:
    """The (train, validation) shards that the run began with, even if their sources have changed since.

    Prepared again where they are gone or damaged; UserError where that gives other data.
    """
    used = (run.read_json("lineage.json") or {}).get("data", {})
    wanted = (used.get("train"), used.get("validation"))
    parts: list[TokenShards | None] = []
    try:
        for name, fingerprint in zip(("train", "validation"), wanted, strict=True):
            part = TokenShards.open(Path(used["directory"], name)) if fingerprint else None
            if part is not None:
                part.verify()
            parts.append(part)
    except (DamagedDataError, KeyError):
        prepared = prepare(recipe)
        parts = [prepared.train, prepared.validation]
    if wanted != tuple(part and part.fingerprint for part in parts):
        raise UserError(
            f"{run.path}: the prepared data that this run was trained on ({used.get('directory')}) is gone "
            "or changed, and its sources now give other data; put it back, or train anew"
        )
    train, validation = parts
    assert train is not None
    return train, validation


def check_unchanged(run: RunDirectory, recipe: Recipe, reporter: Reporter) -> None:
    """UserError where the base model is another one; a warning where last bits may differ."""
    before = (run.read_json("lineage.json") or {}).get("model", {})
    if recipe.adapt.method != "full" and before != model_identity(recipe):
        raise UserError(f"{run.path}: {recipe.model.source} is no longer the model that this run began with")
    then, now = run.read_json("environment.json") or {}, environment()
    cpus, torches = (
        (then.get("cpu"), now["cpu"]),
        (then.get("packages", {}).get("torch"), now["packages"]["torch"]),
    )
    for name, (old, new) in (("cpu", cpus), ("torch", torches)):
        if old != new:
            reporter.warn(f"the run began with {name} {old}, now it is {new}: last bits may differ")
