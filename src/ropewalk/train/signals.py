"""Signals ask the loop to stop after the step it is in; a second SIGINT aborts at once.

SIGINT and SIGTERM come from a person, or from a scheduler that ends a job. SIGUSR1 and SIGUSR2 are what
schedulers are told to send before they take the machine away: the job wants to be started again.
"""

import signal
import threading
from types import FrameType
from typing import Any

from ropewalk.parallel import World

PREEMPTIONS = ("SIGUSR1", "SIGUSR2")
STOPS = ("SIGINT", "SIGTERM", *PREEMPTIONS)


class StopRequest:
    """`with StopRequest() as stop:` then look at `stop.signal`: the name of the signal that came, or None.

    Outside the main thread Python cannot receive signals: then this never asks for anything.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self._own: str | None = None
        """what this process got"""
        self._agreed: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def signal(self) -> str | None:
        """Of several processes: what any of them got, from `agree` on."""
        return self._own if self._world.size == 1 else self._agreed

    @property
    def preempted(self) -> bool:
        return self.signal in PREEMPTIONS

    def __bool__(self) -> bool:
        return self.signal is not None

    def agree(self, wish: bool = False) -> bool:
        """If one of several processes was asked to stop, all are from here on; each comes here as often.

        Returns whether any of them has the `wish`.
        """
        if self._world.size == 1:
            return wish
        *stops, wishes = self._world.everywhere([*(self._own == name for name in STOPS), wish])
        heard = [name for name, count in zip(STOPS, stops, strict=True) if count]
        self._agreed = self._agreed or (heard[0] if heard else None)
        return wishes > 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in map(signal.Signals.__getitem__, STOPS):
                self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: FrameType | None) -> None:
        if self._own is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = signal.Signals(number).name
