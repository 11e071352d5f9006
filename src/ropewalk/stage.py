"""Headings with elapsed seconds for long commands, and a line that says how far they are. All on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.status import Status

EVERY = 15.0
"""Seconds between lines where there is no terminal to redraw one on."""


class Stage:
    """`with Stage("evaluate") as stage:` prints the heading, and at the end how long it took."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.seconds = 0.0
        self._status: Status | None = None
        self._began: tuple[str, float, int] | None = None
        """what is under way, since when, and how much of it was done then"""

    def __enter__(self) -> "Stage":
        self._start = self._said = time.perf_counter()
        self.console.print(f"== {self.title}", markup=False, style="bold")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        if self._status is not None:
            self._status.stop()
        if error is None:
            self.console.print(f"   {self.seconds:.1f} s", style="dim")

    def progress(self, what: str, done: int, of: int) -> None:
        """Say that `done` of `of` are done of `what`, how many a second, and when all will be."""
        now = time.perf_counter()
        if self._began is None or self._began[0] != what:
            self._began = what, now, done
        elapsed, new = now - self._began[1], done - self._began[2]
        text = f"   {what}: {done:,}/{of:,}"
        if elapsed > 1 and new > 0:
            left = round((of - done) * elapsed / new)
            text += f" ({new / elapsed:,.3g} a second, {left // 60}:{left % 60:02} left)"
        if self.console.is_terminal:
            if self._status is None:
                self._status = self.console.status(text)
                self._status.start()
            self._status.update(text)
        elif now - self._said >= EVERY:
            self._said = now
            self.console.print(text, markup=False)


class Stages:
    """Numbered headings, and the seconds that each stage took."""

    def __init__(self, count: int, progress: bool = True) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not progress)
        self.count = count
        self.seconds: dict[str, float] = {}

    @contextmanager
    def next(self, name: str) -> Iterator[Stage]:
        with Stage(f"{len(self.seconds) + 1}/{self.count} {name}", self.console) as stage:
            yield stage
        self.seconds[name] = stage.seconds
