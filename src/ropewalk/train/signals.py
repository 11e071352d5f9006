"""SIGINT and SIGTERM ask the loop to stop after the step it is in; a second SIGINT aborts at once."""

import signal
import threading
from types import FrameType
from typing import Any

from ropewalk.parallel import World


class StopRequest:
    """`with StopRequest() as stop:` then look at `stop.signal`: the name of the signal that came, or None.

    Outside the main thread Python cannot receive signals: then this never asks for anything.
    """

    def __init__(self, world: World | None = None) -> None:
        self.signal: str | None = None
        self._world, self._agreed = world or World(), False
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None if self._world.size == 1 else self._agreed

    def agree(self, wish: bool = False) -> bool:
        """If one of several processes was asked to stop, all are from here on; each comes here as often.

        Returns whether any of them has the `wish`.
        """
        if self._world.size == 1:
            return wish
        stops, wishes = self._world.everywhere([self.signal is not None, wish])
        self._agreed = self._agreed or stops > 0
        return wishes > 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
