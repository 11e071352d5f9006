"""Everything that a run needs, opened once: data, model, optimizer, position; new or from a checkpoint."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ropewalk.adapt import rate_factors
from ropewalk.data import Batch, Loader, Prepared, TokenShards
from ropewalk.data.entry import name_sources
from ropewalk.errors import UserError
from ropewalk.files import sha256
from ropewalk.model import resolve_source
from ropewalk.parallel import World, divided, load_tensors, part_of, shard
from ropewalk.recipe import Recipe
from ropewalk.track.environment import git_commit
from ropewalk.train.build import DTYPES, Built, build
from ropewalk.train.cadence import young_interval
from ropewalk.train.checkpoint import load_state, random_state, set_random_state
from ropewalk.train.flops import stages_of
from ropewalk.train.host_memory import give_back_large_blocks
from ropewalk.train.metrics import Meter
from ropewalk.train.optim import Optimizer, OptimizerConfig
from ropewalk.train.pipelined import PipelinedSteps
from ropewalk.train.saving import Contents, Saver, check_room
from ropewalk.train.schedule import learning_rate
from ropewalk.train.self_check import SelfCheck, check_compiled, self_check
from ropewalk.train.spikes import Spikes
from ropewalk.train.stragglers import Paces


@dataclass
class Job:
    """A run in progress. `step` optimizer steps of `steps` are done."""

    recipe: Recipe
    device: torch.device
    built: Built
    optimizer: Optimizer
    loader: Loader
    validation: Loader | None
    steps: int
    meter: Meter
    world: World
    pipeline: PipelinedSteps | None = None
    """computes the steps where processes have some of the blocks each"""
    checkpoint_bytes: int = 0
    """about what a checkpoint of this run takes on the disk"""
    step: int = 0
    validation_losses: dict[int, float] = field(default_factory=dict)
    """by step"""
    checked: SelfCheck | None = None
    """what the self-check found; None where there was none"""
    compile_seconds: float | None = None
    """None where nothing is compiled"""
    saved: Path | None = None
    """the newest checkpoint written, or the one that the run went on from"""

    saved_at: float = field(default_factory=time.monotonic)
    """when that was, or when the job was opened"""

    spikes: Spikes = field(default_factory=lambda: Spikes(64))

    paces: Paces = field(default_factory=Paces)

    at: Callable[[int, str], None] = lambda step, phase: None
    """told the step and what is done now: see `Watchdog.at`"""

    before_update: Callable[[], None] = lambda: None
    """called before weights and states change: see `Saver.settle`"""

    @property
    def rows(self) -> int:
        """Rows in an optimizer step."""
        assert self.recipe.train.batch_size is not None
        return self.recipe.train.batch_size

    @property
    def own_rows(self) -> int:
        """Rows of an optimizer step that this process computes."""
        return self.rows // self.world.layout.data

    @property
    def micro_rows(self) -> int:
        return self.recipe.train.micro_batch_size or self.own_rows

    def micro_batches(self, own: Batch) -> list[Batch]:
        """This process's rows of a step, as they are computed one after the other."""
        return [own.rows(row, row + self.micro_rows) for row in range(0, self.own_rows, self.micro_rows)]

    @property
    def warmup(self) -> int:
        schedule = self.recipe.train.schedule
        if schedule.warmup_steps is not None:
            return schedule.warmup_steps
        return round(schedule.warmup_fraction * self.steps)

    def learning_rate(self) -> float:
        """The learning rate of this step, the `step`-th of `steps`."""
        optimizer, schedule = self.recipe.train.optimizer, self.recipe.train.schedule
        assert optimizer.learning_rate is not None
        return learning_rate(
            self.step,
            self.steps,
            peak=optimizer.learning_rate,
            name=schedule.name,
            warmup=self.warmup,
            decay_fraction=schedule.decay_fraction,
            minimum=schedule.minimum,
        )

    def due(self, every: int) -> bool:
        """Whether something that happens each `every` steps (0: never before the end) happens now."""
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def save_is_due(self, saver: Saver) -> bool:
        """Whether a checkpoint is due by the clock (train.checkpoint_minutes). The first process decides."""
        minutes, hours = self.recipe.train.checkpoint_minutes, self.recipe.train.failure_hours
        if minutes is None or not self.world.first:
            return False
        if minutes != "auto":
            seconds = 60 * minutes
        elif saver.busy:
            return False  # it would be waited for
        elif saver.last is None:
            return True  # the first one is made at once: it says what they cost
        else:
            assert hours is not None
            seconds = young_interval(saver.last.waited, 3600 * hours)
        return time.monotonic() - self.saved_at >= seconds

    def save(self, saver: Saver, copy: bool) -> None:
        """Begins to write the checkpoint of this step: see `Saver.begin`."""
        divided(self.built.model, self.world)
        trained = self.optimizer.parameters
        random_tensors, random_json = random_state(self.world.rank)
        frozen = {name: self.built.model.get_parameter(name) for name in self.built.saved()}
        contents = Contents(
            self.step,
            tensors={**self.optimizer.state_tensors(), **random_tensors},
            trained=trained,
            frozen={name: parameter for name, parameter in frozen.items() if name not in trained},
            state=json.dumps(
                {
                    "step": self.step,
                    "steps": self.steps,
                    "loader": self._position(),
                    "random": random_json,
                    "spikes": self.spikes.state(),
                    **self.meter.totals(),
                }
            ),
            save_model=self.built.save,
            needed=self.checkpoint_bytes,
            validation_loss=self.validation_losses.get(self.step),
        )
        self.saved_at = time.monotonic()
        self.saved = saver.begin(contents, copy)

    def check_room(self, folder: Path) -> None:
        """RopewalkError where the disk has no room for the checkpoints that will be in `folder`."""
        train = self.recipe.train
        saves = math.ceil((self.steps - self.step) / train.checkpoint_every) if train.checkpoint_every else 1
        check_room(
            folder,
            self.checkpoint_bytes,
            saves=saves if train.checkpoint_minutes is None else None,
            keep=train.keep,
            best=self.validation is not None,
        )

    def restore(self, checkpoint: Path) -> None:
        """Goes on from a verified checkpoint. UserError where it belongs to other data or another model."""
        state = load_state(checkpoint)
        divided(self.built.model, self.world)  # back from a step, weights may still be gathered
        elsewhere = self.built.elsewhere()
        tensors = load_tensors(checkpoint / "state", self.optimizer.parameters, self.world, elsewhere)
        self.step, self.saved = state["step"], checkpoint
        self.spikes.load(state.get("spikes", {}))
        if state["loader"] != self._position():
            raise UserError(
                f"{checkpoint}: was made with other data ({state['loader']}, now {self._position()}); "
                "put the prepared data back, or train anew"
            )
        try:
            self.optimizer.load_state_tensors(tensors)
        except ValueError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        for name in self.meter.totals():
            setattr(self.meter, name, state[name])
        set_random_state(tensors, state["random"], self.world.rank)

    def _position(self) -> dict[str, Any]:
        return self.loader.state((self.spikes.batch(self.step) + 1) * self.rows if self.step else 0)


def open_job(
    recipe: Recipe,
    data: TokenShards,
    held_out: TokenShards | None,
    checkpoint: Path | None = None,
    world: World | None = None,
) -> Job:
    """Builds all parts of a resolved recipe's run, at the step of `checkpoint` (verified) or at step 0."""
    world = world or World()
    train = recipe.train
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda, but torch finds no usable GPU here (see `ropewalk doctor`)")
    if train.threads:
        torch.set_num_threads(train.threads)
    device = torch.device("cuda", world.local_rank) if train.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        give_back_large_blocks()
    built = build(recipe, device, checkpoint)
    loader = rows_of(recipe, data, built.tokenizer)
    validation = (
        rows_of(recipe, held_out, built.tokenizer, mixed=False)
        if held_out is not None and len(held_out)
        else None
    )
    steps = total_steps(recipe, loader)
    # before the optimizer, which takes gradients away
    checked = check(recipe, built, loader, steps) if train.self_check and not checkpoint else None
    warm_up = warm(recipe, built, loader) if train.compile else None
    stages = stages_of(built.model.config, world.layout.stages)
    shard(built.model, world, stages)
    optimizer = Optimizer(
        built.model,
        optimizer_config(recipe),
        rate_factors=rate_factors(built.model, ratio) if (ratio := recipe.adapt.b_rate) != 1.0 else None,
        seed=recipe.seed,
        world=world,
    )
    meter = Meter(
        built.model.config, device, DTYPES[train.precision], built.trainable if built.adapted else None
    )
    job = Job(
        recipe,
        device,
        built,
        optimizer,
        loader,
        validation,
        steps,
        meter,
        world,
        checkpoint_bytes=round(world.everywhere([_written(built, optimizer, world)])[0]),
        checked=checked,
        compile_seconds=warm_up,
        spikes=Spikes(train.spike.window),
        paces=Paces(world, () if train.compile else built.model.blocks.children(), device.type),
    )
    if world.layout.pipeline > 1:
        micro_batches, shape = job.own_rows // job.micro_rows, (job.micro_rows, recipe.data.sequence_length)
        job.pipeline = PipelinedSteps(
            built.model, optimizer, world, stages, micro_batches, shape, train.loss_chunk
        )
    if checkpoint is not None:
        job.restore(checkpoint)
    return job


def _written(built: Built, optimizer: Optimizer, world: World) -> float:
    """Bytes that this process writes, or has written, into a checkpoint."""
    saved, total = set(built.saved()), 0.0
    for name, parameter in built.model.named_parameters():
        part = part_of(name, parameter, world)
        each = optimizer.saved_bytes(name) if name in optimizer.parameters else 0.0
        each += parameter.element_size() if name in saved else 0
        total += part.writes * math.prod(part.size) * each
    return total


def rows_of(recipe: Recipe, shards: TokenShards, tokenizer: Any, mixed: bool = True) -> Loader:
    """The rows of a resolved recipe's run; not `mixed`: those of held-out data, each document once."""
    data, pad = recipe.data, tokenizer.pad_token_id
    names = name_sources([source.model_dump(exclude={"weight"}) for source in data.train])
    weights = {
        name.name: source.weight
        for name, source in zip(names, data.train, strict=True)
        if source.weight is not None
    }
    return Loader(
        shards,
        data.sequence_length,
        data.packing,
        recipe.train.batch_size or 1,
        recipe.seed,
        pad if pad is not None else 0,
        weights=weights if mixed else None,
        temperature=data.temperature if mixed else 1.0,
        curriculum=data.curriculum if mixed else "none",
    )


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """The optimizer of a resolved recipe, whose fields have the same names."""
    wanted = recipe.train.optimizer
    assert wanted.beta1 is not None  # resolved
    assert wanted.beta2 is not None
    shared = {field.name for field in fields(OptimizerConfig)}
    return OptimizerConfig(betas=(wanted.beta1, wanted.beta2), **wanted.model_dump(include=shared))


def check(recipe: Recipe, built: Built, loader: Loader, steps: int) -> SelfCheck | None:
    """The self-check on the run's first batch, at about 2% of the run's cost."""
    train = recipe.train
    rows = train.batch_size or 1
    # three passes, the plain one at about twice the cost: four times its tokens
    tokens = steps * rows * recipe.data.sequence_length // 200
    return self_check(built.model, loader.batch(0, rows), chunk=train.loss_chunk, tokens=tokens)


def warm(recipe: Recipe, built: Built, loader: Loader) -> float:
    """Compiles the blocks, and compares them with the blocks as written; the seconds that compiling took.

    What is in the cache on disk takes few.
    """
    train = recipe.train
    rows = train.micro_batch_size or train.batch_size or 1
    return check_compiled(
        built.model, loader.batch(0, rows), chunk=train.loss_chunk, compare=train.self_check
    )


def total_steps(recipe: Recipe, loader: Loader) -> int:
    """Optimizer steps in the run; a last batch that is not full is filled from the next epoch."""
    train = recipe.train
    rows = train.batch_size or 1
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / (rows * recipe.data.sequence_length))
    assert train.epochs is not None
    whole = int(train.epochs)
    wanted: float = sum(loader.rows_per_epoch(epoch) for epoch in range(whole))
    if train.epochs > whole:
        wanted += (train.epochs - whole) * loader.rows_per_epoch(whole)
    return max(1, math.ceil(wanted / rows))


def lineage(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What a run was made from: data, first weights, code, and the run that its model comes from."""
    return {
        "data": {
            "directory": str(prepared.directory.absolute()),
            "fingerprint": prepared.fingerprint,
            "train": prepared.train.fingerprint,
            "validation": prepared.validation.fingerprint if prepared.validation is not None else None,
        },
        "model": model_identity(recipe),
        "git_commit": git_commit(),
        "parent_run": _parent_run(recipe.model.source),
    }


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """The source of a model and the SHA-256 of its weight files; for one from scratch its shape and seed."""
    source = recipe.model.source
    if source is None:
        return {"config": recipe.model.config, "seed": recipe.seed}
    folder = resolve_source(source, revision=recipe.model.revision)
    weights = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:  # one after the other 16 GB take nine seconds, for which a GPU waits
        digests = pool.map(sha256, weights)
        return {"source": source, "files": {f.name: d for f, d in zip(weights, digests, strict=True)}}


def _parent_run(source: str | None) -> str | None:
    path = Path(source).absolute() if source is not None else None
    if path is None or not path.exists():
        return None
    return next((str(p) for p in (path, *path.parents) if (p / "recipe.yaml").exists()), None)
