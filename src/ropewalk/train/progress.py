"""What a person sees of a run: a bar with the time left on a terminal, else plain lines. All on stderr."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Reporter:
    """Shows records of the loop; `shown=False` keeps everything but `warn` to itself."""

    def __init__(self, shown: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.shown = shown
        self._bar: Progress | None = None
        self._steps = 0
        self._first: tuple[int, float] | None = None

    def start(self, steps: int, done: int) -> None:
        """Begins a run of `steps`, of which `done` are behind us."""
        self._steps = steps
        self._first = None
        if self.shown and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            # twice a second: drawing is work for a core that should train
            self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._bar.start()

    def step(self, record: dict[str, Any], line: bool = True) -> None:
        """Shows one training step; `line`: whether it deserves a line where there is no bar."""
        if self._first is None:  # what came before the first step comes once: it says nothing of the rest
            self._first = (record["step"] - 1, time.perf_counter() - record["seconds"])
        text = (
            f"loss {record['loss']:.4f}  grad {record['gradient_norm']:.3g}  "
            f"{record['tokens_per_second']:.0f} tok/s  {self._left(record['step'])} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif line:
            self.say(f"step {record['step']}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Shown even when nothing else is."""
        self.console.print(f"warning: {text}", markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, step: int) -> str:
        assert self._first is not None
        done, since = self._first
        seconds = (time.perf_counter() - since) / max(1, step - done) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
