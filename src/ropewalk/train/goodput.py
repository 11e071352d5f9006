"""Goodput: the share of the time since a run's first start that went into steps which count.

Every start and end is a line in metrics-life.jsonl, which no resume shortens.
"""

import time
from dataclasses import dataclass
from typing import Any

from ropewalk.track import RunDirectory

LIFE = "life"


@dataclass(frozen=True)
class Goodput:
    """Seconds since the first start, those in steps that count, and by name where the others went."""

    wall: float
    useful: float
    lost: dict[str, float]

    def __str__(self) -> str:
        shares = [(seconds / self.wall, name) for name, seconds in self.lost.items()]
        named = ", ".join(f"{share:.1%} {name}" for share, name in shares if share >= 0.0005)
        return f"{self.useful / self.wall:.1%} of {self.wall:,.0f} s in steps that count" + (
            f" ({named})" if named else ""
        )


def note_start(run: RunDirectory, began: float, train_seconds: float, left: dict[str, Any]) -> None:
    """A start at time `began`, which goes on after `train_seconds` of steps; `left`: see `left_behind`."""
    run.log({"kind": "start", "time": began, "train_seconds": train_seconds, **left}, LIFE)


def note_end(run: RunDirectory) -> None:
    run.log({"kind": "end", "time": time.time()}, LIFE)


def note_rollback(run: RunDirectory, seconds: float) -> None:
    """Going back to a checkpoint, after which there were `seconds` of steps."""
    run.log({"kind": "rollback", "time": time.time(), "seconds": seconds}, LIFE)


def left_behind(run: RunDirectory) -> dict[str, Any]:
    """When the run was last seen, and how many seconds of steps it had then: before its metrics are cut."""
    trained = [record for record in run.read() if record["kind"] == "train"]
    if not trained:
        return {}
    return {"last_time": trained[-1]["time"], "last_seconds": trained[-1]["train_seconds"]}


def goodput(run: RunDirectory, train_seconds: float, now: float | None = None) -> Goodput:
    """Of a run that has `train_seconds` in steps that count; the names of `lost` say what else it did."""
    life, now = run.read(LIFE), now or time.time()
    lost = {"validation": 0.0, "checkpoints": 0.0, "skipped steps": 0.0}
    lost |= {"steps done twice": 0.0, "not running": 0.0}
    names = {"validation": "validation", "checkpoint": "checkpoints", "skip": "skipped steps"}
    for record in run.read():
        name = names.get(record["kind"])
        if name is not None:
            lost[name] += record["seconds"]
    ended = None
    for record in life:
        if record["kind"] == "end":
            ended = record["time"]
            continue
        if record["kind"] == "rollback":
            lost["steps done twice"] += record["seconds"]
            continue
        if "last_time" in record:
            lost["steps done twice"] += max(0.0, record["last_seconds"] - record["train_seconds"])
            # of one that was killed nobody knows more than when it last said something
            lost["not running"] += max(0.0, record["time"] - max(ended or 0.0, record["last_time"]))
        ended = None
    wall = max(now - life[0]["time"], train_seconds) if life else train_seconds
    lost["getting ready and the rest"] = max(0.0, wall - train_seconds - sum(lost.values()))
    return Goodput(wall, train_seconds, lost)
