"""Stragglers: which process the others wait for, and how much longer its work takes.

Processes that train together all take as long as the slowest, so the time of a step says nothing. A process's
own work does: the time that it waits for its data, and the time that the forward passes of its blocks take,
without what is waited for between them. Both are read where the step waits anyway; once in EVERY steps the
processes tell each other. Compiled blocks are not timed: then only the data says something.
"""

import socket
import time
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import nn

from ropewalk.parallel import World

EVERY = 10
"""Steps between two looks."""
SLOW = 1.5
"""So many times the median's work is slow."""
MATTERS = 0.05
"""What is more than the median's work must be this share of the time of the steps."""
TIMES = 2
"""Looks one after the other in which a process must be slow."""


def slow(own: Sequence[float], seconds: float) -> list[int]:
    """The processes (indices of `own`) that take much longer for their own work, in steps of `seconds`.

    The median of two is the smaller one: one of two can be slow, and not both.
    """
    usual = median_low(own)
    return [i for i, work in enumerate(own) if work > SLOW * usual and work - usual > MATTERS * seconds]


class BlockTimer:
    """Seconds that the forward passes of some blocks take here, without what they wait for between them.

    Must come after `parallel.shard`, whose hooks gather weights before a block and let go of them after it.
    On a GPU with events, which are read when the step has waited for it: nothing waits for them.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: str = "cpu") -> None:
        self._on_gpu = device == "cuda"
        self._begun: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        for block in blocks:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after, prepend=True)

    def begin(self) -> None:
        """What was done until now (a validation, say) does not count."""
        self._pairs = []

    def take(self) -> float:
        """Of what was done since `begin`; on a GPU after it was waited for."""
        pairs, self._pairs = self._pairs, []
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, *_: Any) -> None:
        self._begun = self._now()

    def _after(self, *_: Any) -> None:
        self._pairs.append((self._begun, self._now()))


class Paces:
    """Adds up the times of this process's steps, and compares them with the others'. Alone: nothing."""

    def __init__(
        self, world: World | None = None, blocks: Iterable[nn.Module] = (), device: str = "cpu"
    ) -> None:
        self.world = world or World()
        blocks = list(blocks) if self.world.size > 1 else []
        # the stages of a pipeline have more and fewer blocks: what is compared is the time of one
        self._blocks = len(blocks) if self.world.layout.pipeline > 1 else 1
        self._timer = BlockTimer(blocks, device)
        self._steps = 0
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._slow_for: dict[int, int] = {}

    def begin(self) -> None:
        """Before a step."""
        self._timer.begin()

    def add(self, seconds: float, data_wait: float, waiting: float) -> None:
        """A step, of which so much was spent waiting for data, and for the others in totals on the host."""
        if self.world.size > 1:
            times = (seconds, data_wait, self._timer.take() / max(1, self._blocks), waiting)
            self._sums = [total + more for total, more in zip(self._sums, times, strict=True)]
            self._steps += 1

    def look(self, step: int) -> list[dict[str, Any]]:
        """A record for each process that is slow, every EVERY steps; each process must come here."""
        if self._steps < EVERY:
            return []
        notes = self.world.each((socket.gethostname(), self._sums))
        self._steps, self._sums = 0, [0.0] * 4
        columns = zip(*(sums for _, sums in notes), strict=True)
        seconds, waits, forwards, waiting = map(list, columns)
        own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
        late = slow(own, seconds[0])
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in late}
        return [
            {
                "kind": "straggler",
                "step": step,
                "rank": rank,
                "host": notes[rank][0],
                "times": round(own[rank] / max(median_low(own), 1e-9), 2),
                "looks": looks,
                "steps": EVERY,
                "seconds": [round(x, 4) for x in seconds],
                "data_wait_seconds": [round(x, 4) for x in waits],
                "forward_seconds": [round(x, 4) for x in forwards],
                "waiting_seconds": [round(x, 4) for x in waiting],
            }
            for rank, looks in self._slow_for.items()
            if looks >= TIMES
        ]


def sentence(record: dict[str, Any]) -> str:
    """What a record of a straggler says."""
    rank, steps = record["rank"], record["steps"]
    waits, forwards = record["data_wait_seconds"], record["forward_seconds"]
    return (
        f"process {rank} on {record['host']} is slow: {record['times']:.1f} times the median's work in the "
        f"last {steps} steps ({1000 * forwards[rank] / steps:.0f} ms a step in its blocks, the median "
        f"{1000 * median_low(forwards) / steps:.0f}; {1000 * waits[rank] / steps:.0f} ms waiting for data, "
        f"the median {1000 * median_low(waits) / steps:.0f})"
    )
