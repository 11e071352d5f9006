"""Reading runs back: a list of them, one of them, and the difference of two."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ropewalk.errors import RopewalkError
from ropewalk.track.run import RunDirectory


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance. Losses are None where nothing was measured; tokens exclude padding."""

    path: Path
    status: str
    """finished, running, or stopped"""
    started: float | None
    """seconds since 1970"""
    step: int
    steps: int | None
    loss: float | None
    validation_before: float | None
    validation_after: float | None
    tokens_seen: int
    tokens_per_second: float | None
    seconds: float
    """in training steps: without evaluation and checkpoints"""


def list_runs(root: str | Path) -> list[RunSummary]:
    """All runs under `root`, oldest first; a damaged one is listed with status `unreadable`."""
    summaries = []
    for recipe in Path(root).glob("*/recipe.yaml"):
        try:
            summaries.append(summarize(recipe.parent))
        except RopewalkError:
            empty = (None, None, None, None)
            summaries.append(RunSummary(recipe.parent, "unreadable", None, 0, *empty, 0, None, 0.0))
    return sorted(summaries, key=lambda run: (run.started or 0.0, run.path.name))


def summarize(path: str | Path) -> RunSummary:
    """Reads one run's metrics. UserError where `path` is no run directory."""
    run = RunDirectory.open(path)
    records = run.read()
    starts = [r for r in records if r.get("kind") == "start"]
    trained = [r for r in records if r.get("kind") == "train"]
    validated = [r["loss"] for r in records if r.get("kind") == "validation"]
    last = trained[-1] if trained else {}
    seconds = last.get("train_seconds", 0.0)
    speed = last["tokens_seen"] / seconds if seconds else None
    finished = (run.path / "report.md").exists()
    return RunSummary(
        path=run.path,
        status="finished" if finished else "running" if run.locked() else "stopped",
        started=starts[0]["time"] if starts else None,
        step=last.get("step", 0),
        steps=starts[-1]["steps"] if starts else None,
        loss=last.get("loss"),
        validation_before=validated[0] if validated else None,
        validation_after=validated[-1] if len(validated) > 1 else None,
        tokens_seen=last.get("tokens_seen", 0),
        tokens_per_second=speed,
        seconds=seconds,
    )


def diff_runs(first: str | Path, second: str | Path) -> list[tuple[str, Any, Any]]:
    """What differs: (`recipe.train.steps`, 10, 20), ...; recipe, data, environment, results in turn.

    A value that one side does not have is None.
    """
    left, right = (dict(_facts(path)) for path in (first, second))
    keys = list(left) + [key for key in right if key not in left]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def _facts(path: str | Path) -> Iterator[tuple[str, Any]]:
    run = RunDirectory.open(path)
    summary = summarize(path)
    yield from _flatten("recipe", yaml.safe_load((run.path / "recipe.yaml").read_text(encoding="utf-8")))
    yield from _flatten("lineage", run.read_json("lineage.json"))
    yield from _flatten("environment", run.read_json("environment.json"))
    for name in ("status", "step", "loss", "validation_before", "validation_after", "tokens_per_second"):
        yield f"result.{name}", getattr(summary, name)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flatten(f"{name}[{index}]", inner)
    else:
        yield name, value
