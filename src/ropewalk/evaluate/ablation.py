"""What leaving one part of the cleaning out did to the models, in numbers and in words."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ropewalk.evaluate.paired import CONFIDENCE, Paired, number


@dataclass(frozen=True)
class Variant:
    """Data as one kind of run is trained on, of the first seed; `epochs` is how often it sees them."""

    name: str
    documents: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class Ablation:
    """What leaving `without` out did. Of each measure, `before` is with all rules and `after` without it."""

    without: str
    seeds: tuple[int, ...]
    tokens: int
    """that every run was trained on, padding included"""
    variants: tuple[Variant, ...]
    measures: tuple[Paired, ...] = ()
    runs: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: Path | None = None
    """the run that a signal stopped: then there are no measures yet"""
    report: Path | None = field(default=None, compare=False)

    @property
    def verdicts(self) -> list[str]:
        return [verdict(one, self.without) for one in self.measures]

    def markdown(self, name: str) -> str:
        """The report; `name` is the recipe's."""
        before, after = sides_of(self.without)
        lines = [f"# {name}: what {self.without} does", ""]
        seeds = ", ".join(map(str, self.seeds))
        lines += [f"Runs of {self.tokens:,} tokens each, padding included, with the seeds {seeds}.", ""]
        lines += [f"- {sentence}" for sentence in (*self.verdicts, *self.notes)]
        lines += ["", "| trained on | documents | tokens | seen so often |", "|---|---|---|---|"]
        lines += [f"| {v.name} | {v.documents:,} | {v.tokens:,} | {v.epochs:.2f} |" for v in self.variants]
        for one in self.measures:
            rows = zip(self.seeds, one.before, one.after, one.differences, strict=True)
            lines += [
                "",
                f"## {one.measure}",
                "",
                f"| seed | {before} | {after} | difference |",
                "|---|---|---|---|",
            ]
            lines += [f"| {seed} | {a:.4f} | {b:.4f} | {d:+.4f} |" for seed, a, b, d in rows]
            means = " | ".join(f"{fmean(x):.4f}" for x in (one.before, one.after, one.differences))
            spreads = " | ".join(f"{stdev(x):.4f}" for x in (one.before, one.after, one.differences))
            lines += [f"| mean | {means} |", f"| standard deviation | {spreads} |", ""]
            low, high = one.mean - one.half_width, one.mean + one.half_width
            lines += [
                f"Difference {one.mean:+.4f}, standard error {one.error:.4f}; paired t interval of "
                f"{CONFIDENCE:.0%} {low:+.4f} to {high:+.4f}; p = {one.p_value:.2g}."
            ]
        lines += ["", "## Runs", "", *(f"- `{run}`" for run in self.runs)] if self.runs else []
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("without", "seeds", "tokens", "notes", "verdicts")}
        variants = [vars(variant) for variant in self.variants]
        measures = [one.as_dict() for one in self.measures]
        return {**own, "variants": variants, "measures": measures, "runs": [str(run) for run in self.runs]}


def sides_of(without: str) -> tuple[str, str]:
    """What the two kinds of run are called."""
    return "all rules", f"all but {without}"


def verdict(pair: Paired, without: str) -> str:
    """A measure in plain words."""
    seeds = number(len(pair.before))
    if pair.better is None:
        return f"{pair.measure}: no difference that {seeds} seeds can show: {pair.numbers()}"
    does = "raises" if pair.mean > 0 else "lowers"
    helps = "hurts" if pair.better else "helps"
    size = f"{abs(pair.mean):.4g} +- {pair.half_width:.2g} ({seeds} seeds)"
    return f"{pair.measure}: leaving {without} out {does} it by {size}: {without} {helps}"
