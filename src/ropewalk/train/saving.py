"""Writes checkpoints in a thread, while training goes on or while the run waits for it.

Where training goes on, the run waits only until its tensors are copied to the host's memory (if that has room
for them: half of what is free must do). On a CPU the thread copies them too: they change with an update only,
so that the next step need not wait before that. At most one save is under way: the next one, the end of the
run, a stop and an error wait for it.

No collective operation is issued in the thread: beside those of the training, in another order in each
process, they would wait for each other for ever; and a second set of connections is not worth having for
what is said once in a checkpoint. The threads tell each other by files. Each process writes its part of the
state, then (by a rename) a seal with its size and hash, or what went wrong. The first one's waits for the
seals, makes model/ from the parts that lie there now, one tensor after the other (so nobody gathers the model
or holds all of it), writes the manifest and renames the folder. Which folder that is, and that nobody is busy
with the one before, is agreed upon when a save begins, in the main thread.

What is trained is in model/ what its master in the state is, in the type of the weight: the update makes the
weight from it in the same way. What is frozen never changes, so it need not be copied.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.files import (
    atomic_directory,
    atomic_write,
    free_bytes,
    fsync,
    full_disk,
    naming_full_disk,
    remove_leftovers,
)
from ropewalk.ops import QuantizedTensor
from ropewalk.parallel import Part, Stored, World, local, part_file, parts_of, write_parts
from ropewalk.train.checkpoint import checkpoint_name, file_entry, list_checkpoints, prune, write_manifest
from ropewalk.train.host_memory import HostCopies, fill

EXCHANGE = "exchange"
"""The folder in an unfinished checkpoint for what is not of it: seals, and parts of frozen weights."""
PATIENCE = 10.0
"""Seconds after an error for which the other processes' parts are waited for: they may be gone."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of `step` holds."""

    step: int
    tensors: Mapping[str, Tensor]
    """the state's, as `parts_of` takes them, `master.NAME` for each trained parameter; the live ones"""
    trained: Mapping[str, Tensor]
    """parameters by name"""
    frozen: Mapping[str, Tensor]
    """those of the others that `save_model` needs"""
    state: str
    """state.json: text, for what it is made of changes with the next step"""
    save_model: Callable[[Path, Callable[[str], Tensor]], None]
    """writes model/ from a function that gives whole parameters by name"""
    needed: int
    """about so many bytes will be written"""
    validation_loss: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is written: seconds that the run `waited` for it, of `seconds` in all."""

    step: int
    path: Path
    waited: float
    seconds: float


class Saver:
    """`begin` a save, `settle` before the tensors change; `finish` waits until it is whole, `poll` does not.

    Of the checkpoints in `folder` the `keep` newest and the best stay. `sync` forces onto the disk what must
    be there before the checkpoint is. Used in `with`, it waits for the save under way also after an error.
    """

    def __init__(
        self, folder: Path, keep: int, world: World | None = None, sync: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.keep, self.world, self.sync = folder, keep, world or World(), sync
        self.last: Saved | None = None
        """the newest that was finished here"""
        self._copies = HostCopies()
        self._under_way: Future[Saved] | None = None
        self._waited = 0.0
        self._copied, self._given_up = threading.Event(), threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save was begun and is not finished."""
        return self._under_way is not None

    def begin(self, contents: Contents, copy: bool) -> Path:
        """Starts to write `folder/step-XXXXXXXX`, once the save before is finished: its path.

        With `copy` this returns soon, unless the host has no memory for that; else when this process has
        written all it has to. Every process comes here. RopewalkError where the disk has no room: then
        nothing was begun or deleted.
        """
        assert not self.busy, "finish the save before"
        began = time.perf_counter()
        path = self.folder / checkpoint_name(contents.step)
        with ExitStack() as stack, self._naming_what_is_kept():
            temporary = self._open(path, contents.needed, stack) if self.world.first else None
            temporary = Path(self.world.share(str(temporary)))
            parts = parts_of(contents.tensors, contents.trained, self.world)
            tensors = {name: tensor for name, tensor in contents.tensors.items() if parts[name].writes}
            copies = self._copies.of(tensors) if copy else None
            to_copy: Mapping[str, Tensor] = {} if copies is None else tensors
            if copies is not None and any(tensor.is_cuda for tensor in tensors.values()):
                fill(copies, tensors)  # the stream of the next step must not overtake the copies
                to_copy = {}
            contents = replace(contents, tensors=tensors if copies is None else copies)
            done: Future[Saved] = Future()
            arguments = (done, contents, parts, temporary, path, began, stack.pop_all(), to_copy)
        self._copied.clear()
        self._under_way = done
        # a daemon, so that a second Ctrl-C ends the process
        threading.Thread(target=self._run, args=arguments, daemon=True, name="checkpoint").start()
        if copies is None:
            wait([done])
        self._waited = time.perf_counter() - began
        return path

    def settle(self) -> None:
        """Waits until the tensors of the save under way may change."""
        if self.busy and not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._waited += time.perf_counter() - began

    def finish(self) -> Saved | None:
        """Waits for the save under way, if there is one, and raises what went wrong in it."""
        if self._under_way is None:
            return None
        began = time.perf_counter()
        wait([self._under_way])
        self._waited += time.perf_counter() - began
        return self.poll()

    def poll(self) -> Saved | None:
        """The save under way, if it is done since; raises what went wrong in it. RopewalkError, usually."""
        if self._under_way is None or not self._under_way.done():
            return None
        done, self._under_way = self._under_way, None
        self.last = replace(done.result(), waited=self._waited)
        return self.last

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What goes wrong in the thread now matters less than what has. A second Ctrl-C does not wait."""
        if self._under_way is not None and kind is not None and issubclass(kind, Exception):
            wait([self._under_way], None if self.world.size == 1 else PATIENCE)
            self._given_up.set()
            wait([self._under_way])

    def _open(self, path: Path, needed: int, stack: ExitStack) -> Path:
        remove_leftovers(self.folder)
        if free_bytes(self.folder) < needed:
            raise full_disk(path, needed)
        temporary = stack.enter_context(atomic_directory(path, overwrite=True, needed=needed))
        (temporary / "state").mkdir()
        if self.world.size > 1:
            (temporary / EXCHANGE).mkdir()
        return temporary

    @torch.no_grad()
    def _run(
        self,
        done: "Future[Saved]",
        contents: Contents,
        parts: Mapping[str, Part],
        temporary: Path,
        path: Path,
        began: float,
        stack: ExitStack,
        to_copy: Mapping[str, Tensor],
    ) -> None:
        try:
            try:
                fill(contents.tensors, to_copy)
            finally:
                self._copied.set()
            with self._naming_what_is_kept():
                if self.world.first:
                    with stack:
                        self._write(contents, parts, temporary)
                    prune(self.folder, self.keep)
                else:
                    self._write_and_seal(contents, parts, temporary)
            done.set_result(Saved(contents.step, path, 0.0, time.perf_counter() - began))
        except BaseException as error:
            done.set_exception(error)

    def _write(self, contents: Contents, parts: Mapping[str, Part], folder: Path) -> None:
        """All that the first process has to write, and what the others have."""
        entries = self._write_parts(contents, parts, folder)
        for rank in range(1, self.world.size):
            entries |= self._seal_of(rank, folder)
        with Stored(folder / "state") as state, Stored(folder / EXCHANGE) as frozen:
            contents.save_model(folder / "model", _values(contents, state, frozen))
        shutil.rmtree(folder / EXCHANGE, ignore_errors=True)
        (folder / "state" / "state.json").write_text(contents.state)
        self.sync()
        write_manifest(folder, contents.step, contents.validation_loss, entries)

    def _write_and_seal(self, contents: Contents, parts: Mapping[str, Part], folder: Path) -> None:
        seal = folder / EXCHANGE / f"{self.world.rank}.json"
        try:
            with naming_full_disk(folder, contents.needed):
                atomic_write(seal, json.dumps(self._write_parts(contents, parts, folder)))
        except Exception as error:
            if folder.exists():
                atomic_write(seal, json.dumps({"error": str(error)}))
            raise

    def _write_parts(
        self, contents: Contents, parts: Mapping[str, Part], folder: Path
    ) -> dict[str, dict[str, Any]]:
        """This process's parts; what the manifest says of them."""
        file = folder / "state" / part_file(self.world)
        write_parts(file, contents.tensors, parts)
        fsync(file)
        if self.world.size > 1 and contents.frozen:
            frozen = {f"frozen.{name}": _plain(local(p)) for name, p in contents.frozen.items()}
            where = parts_of(frozen, contents.frozen, self.world)
            write_parts(folder / EXCHANGE / part_file(self.world), frozen, where)
        return {str(file.relative_to(folder)): file_entry(file)}

    def _seal_of(self, rank: int, folder: Path) -> dict[str, dict[str, Any]]:
        """Waits for the parts of another process. RopewalkError with what it says went wrong there."""
        seal = folder / EXCHANGE / f"{rank}.json"
        while not seal.exists():
            if self._given_up.wait(0.02):
                raise RopewalkError(f"process {rank} has not written its part of {folder.name}")
        said: dict[str, Any] = json.loads(seal.read_text(encoding="utf-8"))
        if "error" in said:
            raise RopewalkError(said["error"])
        return said

    @contextmanager
    def _naming_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except RopewalkError as error:
            kept = list_checkpoints(self.folder)
            if not kept:
                raise
            raise RopewalkError(
                f"{error}; the checkpoints before, up to {kept[-1].name}, are kept"
            ) from error


def check_room(folder: Path, one: int, *, saves: int | None, keep: int, best: bool) -> None:
    """RopewalkError where the disk has no room for the checkpoints that a run will have at once.

    Each takes `one` bytes; `saves` are to come (None: nobody knows how many). There are the `keep` newest,
    the `best` where it is known, and the one being written. What is in `folder` already may be replaced.
    """
    count = keep + best + 1
    count = count if saves is None else min(saves, count)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if count * one - there > (free := free_bytes(folder)):
        what = f"{count} of {one:,} bytes (train.keep is {keep}), {free:,} bytes free"
        raise RopewalkError(f"{folder}: no room for the run's checkpoints, {what}; make room or keep fewer")


def _values(contents: Contents, state: Stored, frozen: Stored) -> Callable[[str], Tensor]:
    """Whole parameters by name, from the parts in an unfinished checkpoint."""
    written, kept = set(frozen.names()), set(state.names())

    def value(name: str) -> Tensor:
        if (key := f"master.{name}") in kept:
            return state.read(key)
        key = f"frozen.{name}"
        return frozen.read(key) if key in written else contents.frozen[name].detach()

    return value


def _plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
