"""Notices that a run in several processes hangs, and says which process the others wait for, and where.

Each process has a thread that writes down what its main thread is doing: the step, the phase, the collective
operation and the line. Where nothing has moved for too long, they read each other's notes, agree on whom it
is about, and end. The notes are files in the run directory: a process that is stopped cannot answer, and a
store that it holds would not either.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_write

HUNG = 4
"""Exit status of processes that end because one of them hangs."""
LEAST, FIRST, TIMES = 60.0, 1800.0, 10
"""Seconds without progress: at least, outside of steps and before the first has ended, and in steps as a
multiple of the longest so far."""
PACKAGE = Path(__file__).resolve().parents[1]
SAID = "hang.txt"
WAITING = ("ring_receive", "gathering_wait", "_wait_batch_p2p")
"""functions that wait for other processes, besides torch.distributed's own: ours, and its pipelines'"""


class Watchdog:
    """`with Watchdog(run, rank, size, seconds) as watch:` and then `watch.at(step, phase)` at every change.

    `seconds` without progress in a step are too many, ten times as many elsewhere (validation, checkpoints);
    None: learned from the steps.
    """

    def __init__(self, run: Path, rank: int, size: int, seconds: float | None = None) -> None:
        self.folder, self.rank, self.size, self.seconds = run / "watch", rank, size, seconds
        self.step, self.phase, self.since = 0, "getting ready", time.monotonic()
        self.longest: float | None = None
        self._began = self.since
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ropewalk-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.size > 1:
            self.folder.mkdir(exist_ok=True)
            self._write()  # over that of a start before this one
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, step: int, phase: str) -> None:
        """The main thread is about to do `phase` of `step`; 0.3 microseconds."""
        now = time.monotonic()
        if step != self.step:
            if self.phase == IN_STEP[-1]:
                self.longest = max(self.longest or 0.0, now - self._began)
            self._began = now
        self.step, self.phase, self.since = step, phase, now

    def limit(self) -> float:
        """Seconds that this phase may take."""
        inside = self.phase in IN_STEP
        if self.seconds is not None:
            return self.seconds if inside else TIMES * self.seconds
        return max(LEAST, TIMES * self.longest) if inside and self.longest is not None else FIRST

    def _watch(self) -> None:
        every = min(15.0, (self.seconds or LEAST) / 4)
        while not self._done.wait(every):
            self._write()
            if time.monotonic() - self.since > self.limit():
                self._done.wait(2 * every)  # so that the others' notes are as new
                if time.monotonic() - self.since > self.limit():
                    self._end(3 * every)

    def _write(self) -> None:
        note = {"rank": self.rank, "host": socket.gethostname(), "step": self.step, "phase": self.phase}
        note |= {"seconds": time.monotonic() - self.since, "time": time.time()} | self._place()
        with suppress(OSError, RopewalkError):  # of a full disk: the next one may go through again
            atomic_write(self.folder / f"{self.rank}.json", json.dumps(note))

    def _place(self) -> dict[str, Any]:
        """The innermost line of this package that the main thread is in, and the collective it waits in."""
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        line = collective = None
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            # the outermost of its functions: the one that was called
            if path.name == "distributed_c10d.py" or frame.f_code.co_name in WAITING:
                collective = frame.f_code.co_name
            if line is None and path.is_relative_to(PACKAGE):
                line = f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
            frame = frame.f_back
        return {"line": line, "collective": collective}

    def _end(self, stale: float) -> None:
        self._write()
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]
        notes = [note for note in notes if note["rank"] < self.size]
        said = verdict(notes, self.size, time.time(), stale)
        atomic_write(self.folder / SAID, said)
        os._exit(HUNG)  # the main thread waits in a place that no exception reaches


IN_STEP = ("waiting for data", "forward and backward", "update")


def verdict(notes: list[dict[str, Any]], size: int, now: float, stale: float) -> str:
    """One sentence: whom the others wait for, in which operation, and what it was doing, in which line.

    `notes` as `Watchdog` writes them; one older than `stale` seconds is of a process that answers no more.
    """
    missing = sorted(set(range(size)) - {note["rank"] for note in notes})
    silent = [note for note in notes if now - note["time"] > stale]
    awake = [note for note in notes if note not in silent]
    behind = [note for note in awake if note["collective"] is None]
    waiting = [note for note in awake if note["collective"] is not None]
    step = max((note["step"] for note in notes), default=0)
    where = ""
    if waiting:
        one = waiting[0]
        where = f" to {one['collective']} ({one['phase']}, {one['line']}), where {len(waiting)} wait"
    if missing or silent:
        who = f"process {missing[0]}" if missing else _named(silent[0])
        then = "it has never said anything"
        if not missing:
            then = f"it has not answered for {now - silent[0]['time']:.0f} s, "
            then += f"last seen in step {silent[0]['step']}, {_doing(silent[0])}"
        return f"step {step} hangs: {who} never came{where}; {then}"
    if behind:
        late = min(behind, key=lambda note: (note["step"], -note["seconds"]))
        then = f"it is in step {late['step']}, {_doing(late)}"
        return f"step {step} hangs: {_named(late)} never came{where}; {then}"
    places = "; ".join(
        f"process {n['rank']} in {n['collective']} ({n['phase']}, {n['line']})" for n in waiting
    )
    return f"step {step} hangs: all processes wait, in different operations or for a broken network: {places}"


def _named(note: dict[str, Any]) -> str:
    return f"process {note['rank']} on {note['host']}"


def _doing(note: dict[str, Any]) -> str:
    return f"{note['phase']} ({note['line']}) for {note['seconds']:.0f} s"
