"""Files named by what they were made from, and who makes them: this process, its workers, or a Dask cluster.

A `Task` is a path and how to make what belongs there. The path holds a hash of all that decides the content,
and a file appears there only whole: so what is there need not be made again, a run that was killed goes on
where it was, and it makes no difference who makes what, or in which order.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

from ropewalk.errors import RopewalkError, UserError
from ropewalk.files import atomic_file

Progress = Callable[[str, int, int], None]
ALONE = 16 << 20
"""Bytes of input for which starting other processes would take longer than the work."""


_DISTURBING = {signal.SIGINT, signal.SIGTERM}


class Task(Protocol):
    """Makes one file. Tasks for other processes must be picklable."""

    @property
    def path(self) -> Path: ...

    @property
    def weight(self) -> int:
        """Bytes of input, for the progress that is said."""

    def make(self, path: Path) -> None:
        """Writes the file to `path`, which is not yet its own."""


def key(made_from: Any) -> str:
    """A name for what is made from something JSON-able, and from nothing else."""
    text = json.dumps(made_from, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def run(task: Task) -> None:
    if not task.path.exists():
        with atomic_file(task.path) as temporary:
            task.make(temporary)


class Makers:
    """Runs tasks: in this process where there is one, else in `workers` processes, or on a Dask cluster."""

    def __init__(self, workers: int = 0, on: str | None = None, progress: Progress | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.progress = progress
        self._on = on
        self._pool: Any = None

    def __enter__(self) -> "Makers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None and isinstance(self._pool, ProcessPoolExecutor):
            # Whoever pressed Ctrl-C does not wait for tasks of minutes. (No public way before Python 3.14.)
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def make(self, what: str, tasks: Sequence[Task], here: bool = False) -> None:
        """Returns when all are made. Raises what the first of them, in their order, raised.

        `here`: one after the other in this process, unless there is a cluster: for tasks with threads of
        their own.
        """
        total = sum(task.weight for task in tasks)
        missing = [task for task in tasks if not task.path.exists()]
        done = total - sum(task.weight for task in missing)
        for task in self._finished(missing, here):
            done += task.weight
            if self.progress is not None:
                self.progress(f"{what}, MB", done >> 20, total >> 20)

    def _finished(self, tasks: Sequence[Task], here: bool) -> Iterator[Task]:
        few = len(tasks) < 2 or sum(task.weight for task in tasks) < ALONE
        if self._on is None and (here or few or self.workers == 1):
            for task in tasks:
                run(task)
                yield task
            return
        if self._pool is None:
            self._pool = Cluster(self._on) if self._on else _processes(self.workers)
        with _no_main(), _undisturbed():
            futures = [self._pool.submit(run if self._on else _work, task) for task in tasks]
        try:
            for task, future in zip(tasks, futures, strict=True):
                future.result()
                if self._on and not task.path.exists():
                    raise UserError(
                        f"--on {self._on}: a worker made {task.path}, and it is not there; data.directory "
                        "must be in a file system that this machine and the cluster share"
                    )
                yield task
        except Exception as error:
            if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":
                raise
            raise RopewalkError(
                "a worker process was killed (out of memory?); what is done is kept: prepare again to go on, "
                "with fewer data.workers if memory is short"
            ) from None


def _processes(workers: int) -> ProcessPoolExecutor:
    # Spawned: a fork of a process that has threads (tokenizers, torch, Arrow) may hang.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """In a worker process, before its first task: it ends with its parent, and when its parent says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _DISTURBING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(task: Task) -> None:
    """`run` in a worker process, which would take the next task after any exception."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(task)
    except SystemExit:
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(*_: object) -> None:
    """So that the file that is being written is removed: undisturbed, for a pool ends all its processes again
    when one of them has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _no_main() -> Iterator[None]:
    """A spawned process runs the caller's script again, if it finds one: a script that calls `prepare` and
    has no `if __name__ == "__main__"` would do so without end. Nothing of the script is needed there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait while processes are started. A parent that stops in the middle leaves one that misses what
    it was to be told, and one that is not at `_begin` yet ends like any script: with a traceback."""
    resource_tracker.ensure_running()  # starting it lets signals through again
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # A signal to a process goes to any of its threads, and Python then interrupts the main one.
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _DISTURBING)  # which new processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if main:
            signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class Cluster:
    """A Dask cluster as an executor: `dask` starts one on this machine, `dask:ADDRESS` uses a scheduler."""

    def __init__(self, on: str) -> None:
        kind, _, address = on.partition(":")
        if kind != "dask":
            raise UserError(f"--on {on}: must be dask or dask:ADDRESS")
        try:
            from distributed import Client
        except ImportError:
            raise UserError('--on dask needs an extra: pip install "ropewalk[data]"') from None
        try:
            with _no_main():
                if address:
                    self._client = Client(address, timeout=20)
                else:
                    self._client = Client(dashboard_address=None, threads_per_worker=1)
        except (OSError, ValueError) as error:
            raise UserError(f"--on {on}: no scheduler answers there ({str(error).splitlines()[0]})") from None

    def submit(self, function: Callable[[Task], None], task: Task) -> Any:
        return self._client.submit(function, task, pure=False)

    def shutdown(self, cancel_futures: bool = True) -> None:
        self._client.close()
