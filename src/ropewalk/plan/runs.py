"""Own finished runs as points of a scaling law: parameters, tokens, final validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ropewalk.errors import RopewalkError, UserError
from ropewalk.plan.fit import Point
from ropewalk.track import RunDirectory


@dataclass(frozen=True)
class Collected:
    """What runs gave, and which gave nothing, each with the reason."""

    points: tuple[Point, ...]
    left_out: tuple[str, ...]


def collect(paths: Sequence[str | Path]) -> Collected:
    """Points of run directories, or of all that are in given folders.

    A run counts that was trained from scratch, all weights, to its end, with validation at the end: a law of
    final losses knows no others. UserError where runs that count were validated on different data.
    """
    points: list[Point] = []
    left_out: list[str] = []
    validation: dict[str, Path] = {}
    for path in _runs(paths):
        try:
            run = RunDirectory.open(path)
            lineage = run.read_json("lineage.json") or {}
            found = _point(run)
        except RopewalkError as error:
            found = f"unreadable: {error}"
        if isinstance(found, str):
            left_out.append(f"{path} ({found})")
            continue
        points.append(found)
        validation.setdefault(str(lineage.get("data", {}).get("validation")), path)
    if len(validation) > 1:
        first, second, *_ = validation.values()
        raise UserError(
            f"{first} and {second} were validated on different data, so that their losses cannot be "
            "compared; name runs with the same validation data and tokenizer"
        )
    return Collected(tuple(points), tuple(left_out))


def _runs(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = (
            [path]
            if (path / "recipe.yaml").is_file()
            else sorted(p.parent for p in path.glob("*/recipe.yaml"))
        )
        if not inside:
            raise UserError(f"{path}: no run directory, and none in it; see `ropewalk runs ls`")
        found += [run for run in inside if run not in found]
    return found


def _point(run: RunDirectory) -> Point | str:
    """The run's point, or why there is none."""
    if not (run.path / "report.md").exists():
        return "it is not finished"
    recipe: Any = yaml.safe_load((run.path / "recipe.yaml").read_text(encoding="utf-8")) or {}
    if (recipe.get("adapt") or {}).get("method", "full") != "full":
        return "it trained adapters only"
    if (recipe.get("model") or {}).get("source") is not None:
        return "it went on from a trained model"
    records = run.read()
    last = {kind: _last(records, kind) for kind in ("start", "train", "validation")}
    start, train, validation = last.values()
    if start is None or train is None:
        return "it has no steps"
    if validation is None or validation["step"] != train["step"]:
        return "it was not validated after its last step"
    return Point(start["trainable"], train["tokens_seen"], validation["loss"])


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record.get("kind") == kind), None)
