"""Two plots of an estimate in one picture: memory by term against the limit, time by phase."""

from pathlib import Path

from ropewalk.errors import UserError
from ropewalk.plan.estimates import Estimate

GiB = 2**30


def draw(one: Estimate, path: Path) -> None:
    """Writes a .png or .svg. UserError for another ending, and where matplotlib is not installed."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: a plot is a .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'ropewalk[plots]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    _stack(memory, {name: size / GiB for name, size in one.memory.terms.items()}, "GiB")
    memory.axvline(one.memory.limit / GiB, color="black", linestyle="--", linewidth=1)
    memory.annotate("limit", (one.memory.limit / GiB, 0.45), rotation=90, va="center", ha="right", fontsize=8)
    memory.axvspan(one.memory.low / GiB, one.memory.high / GiB, color="grey", alpha=0.15)
    memory.set_title(f"memory of the fullest device: {one.memory.total_bytes / GiB:.1f} GiB", fontsize=10)
    unit, scale = ("s", 1.0) if one.step_seconds >= 1 else ("ms", 1000.0)
    _stack(seconds, {name: scale * value for name, value in one.time.phases.items()}, unit)
    seconds.set_title(f"time of a step: {one.step_seconds * scale:.3g} {unit}", fontsize=10)
    figure.savefig(path, dpi=130)


def _stack(axes: object, values: dict[str, float], unit: str) -> None:
    """One bar, the largest part first."""
    left, least = 0.0, 0.005 * sum(values.values())
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        if value < least:
            continue
        axes.barh(0, value, left=left, height=0.5, label=f"{name} {value:.3g}", edgecolor="white")  # type: ignore[attr-defined]
        left += value
    axes.set_yticks([])  # type: ignore[attr-defined]
    axes.set_xlabel(unit)  # type: ignore[attr-defined]
    axes.set_ylim(-0.6, 0.6)  # type: ignore[attr-defined]
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)  # type: ignore[attr-defined]
