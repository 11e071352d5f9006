"""What is done to one process of a run, at a step and a moment that the campaign has drawn."""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ropewalk.data import Loader
from ropewalk.model import transformer
from ropewalk.train import loop, saving, stragglers
from ropewalk.train.checkpoint import find_damage, list_checkpoints

ROWS, STEPS, EVERY = 4, 8, 2
"""Rows of a step, steps of a run, and steps between two checkpoints."""
BROKEN_READ = "injected: this page of the data cannot be read"


@dataclass(frozen=True)
class Injection:
    """What is done: `step` counts from 1; `moment` is one of those that the kind has."""

    number: int
    kind: str
    layout: str
    rank: int
    step: int
    moment: str
    resume_in: str
    """the layout in which the run goes on, where it has to be told to"""
    chance: int
    """seed of what is damaged, and where"""


def plant(injection: Injection, runs: Path) -> None:
    """Prepares this process of a run under `runs` for its fault, which happens once."""
    kind, moment, step = injection.kind, injection.moment, injection.step
    if kind == "slow":
        stragglers.EVERY = 2  # every process must know: they compare notes that often
    if injection.rank != int(os.environ["RANK"]) or (runs / "injected.json").exists():
        return
    if kind == "full disk":
        fill_the_disk(moment, step, runs)
    elif kind == "nan":
        poison_the_loss(step, runs)
    elif kind == "slow":
        slow_down(moment, step, runs)
    elif kind == "loader":
        break_the_loader(step, runs)
    else:
        action = {"kill": kill, "kill all": kill_all, "hang": hang, "terminate": terminate}.get(kind)
        at(moment, step, action or (lambda runs: damage_and_die(injection, runs)), runs)


def at(moment: str, step: int, action: Callable[[Path], None], runs: Path) -> None:
    """Does `action` before a step, in its forward pass, or while the checkpoint of the step is written."""
    if moment == "save":

        def saves(file: Path) -> None:
            if f"step-{step:08d}" in str(file):
                action(runs)

        before(saving, "write_parts", lambda file, *_: saves(file))
    elif moment == "before":
        before(loop, "train_step", lambda job, _: action(runs) if job.step == step else None)
    else:
        now = [0]
        before(loop, "train_step", lambda job, _: now.append(job.step))
        before(loop, "loss_sum", lambda *_: action(runs) if now[-1] == step else None)


def before(module: Any, name: str, what: Callable[..., Any]) -> None:
    known = getattr(module, name)

    def function(*arguments: Any, **named: Any) -> Any:
        what(*arguments)
        return known(*arguments, **named)

    setattr(module, name, function)


def valid(runs: Path) -> list[str]:
    """The names of the checkpoints that are whole now."""
    return [path.name for path in checkpoints(runs) if find_damage(path) is None]


def checkpoints(runs: Path) -> list[Path]:
    return [path for folder in sorted(runs.glob("*/checkpoints")) for path in list_checkpoints(folder)]


def note(runs: Path, **more: Any) -> bool:
    """Writes down that it happens now, and which checkpoints are whole; False if it has happened before."""
    try:
        file = (runs / "injected.json").open("x")
    except FileExistsError:
        return False
    with file:
        json.dump({"valid": valid(runs), **more}, file)
    return True


def kill(runs: Path) -> None:
    if note(runs):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_all(runs: Path) -> None:
    """As when the machine goes down: what has started the processes first, so that it starts none again."""
    if note(runs):
        parent = os.getppid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in [parent, *(int(pid) for pid in children if int(pid) != os.getpid()), os.getpid()]:
            os.kill(pid, signal.SIGKILL)


def hang(runs: Path) -> None:
    if note(runs):
        os.kill(os.getpid(), signal.SIGSTOP)


def terminate(runs: Path) -> None:
    """To this process alone: the others must hear of it."""
    if note(runs):
        os.kill(os.getpid(), signal.SIGTERM)


def damage_and_die(injection: Injection, runs: Path) -> None:
    """Of the newest checkpoint: its save, if one is under way, is waited for."""
    last = (injection.step - 1) // EVERY * EVERY
    while not any(path.name == f"step-{last:08d}" for path in checkpoints(runs)):
        time.sleep(0.02)
    whole = valid(runs)
    if note(runs, valid=whole[:-1], damaged=str(damage(injection, checkpoints(runs)[-1]))):
        os.kill(os.getpid(), signal.SIGKILL)


def damage(injection: Injection, checkpoint: Path) -> Path:
    """Cuts off, takes away or changes a file of a checkpoint: which one."""
    random = Random(injection.chance)
    manifest = checkpoint / "MANIFEST.json"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    if injection.kind == "torn" and random.random() < 0.4:
        manifest.unlink()
        return manifest
    file = random.choice(files)
    raw = bytearray(file.read_bytes())
    if injection.kind == "torn":
        raw = raw[: random.randrange(len(raw))]
    else:
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    file.write_bytes(raw)
    return file


def fill_the_disk(moment: str, step: int, runs: Path) -> None:
    """No room for this process's part of a checkpoint, or for the manifest; then somebody makes room."""

    def full(file: Path) -> None:
        if f"step-{step:08d}" in str(file) and note(runs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    before(saving, "write_manifest" if moment == "manifest" else "write_parts", lambda file, *_: full(file))


def poison_the_loss(step: int, runs: Path) -> None:
    known, now = loop.loss_sum, [0]
    before(loop, "train_step", lambda job, _: now.append(job.step))

    def loss_sum(*arguments: Any) -> Any:
        return known(*arguments) * (math.nan if now[-1] == step and note(runs) else 1.0)

    loop.loss_sum = loss_sum


def slow_down(moment: str, step: int, runs: Path) -> None:
    """For five steps, in the blocks or in waiting for data."""
    known, now = loop.train_step, [0]

    def late(batches: Iterator[Any]) -> Iterator[Any]:
        time.sleep(0.4)
        yield next(batches)

    def train_step(job: Any, batches: Iterator[Any]) -> Any:
        now.append(job.step)
        if job.step == step:
            note(runs)
        slow = step <= job.step < step + 5
        return known(job, late(batches) if slow and moment == "data" else batches)

    loop.train_step = train_step
    if moment == "blocks":
        wait = lambda *_: time.sleep(0.2) if step <= now[-1] < step + 5 else None  # noqa: E731
        before(transformer.Block, "forward", wait)


def break_the_loader(step: int, runs: Path) -> None:
    def broken(_: Loader, first: int, rows: int) -> None:
        if first // ROWS == step - 1 and note(runs):
            raise OSError(errno.EIO, BROKEN_READ)

    before(Loader, "batch", broken)


def leave_out(number: int) -> None:
    """The loader has no batch of this number (from 0): what a rollback promises."""
    known = Loader.batch
    Loader.batch = lambda self, at, rows: known(self, at + ROWS * (at >= number * ROWS), rows)
