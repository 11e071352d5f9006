"""The whole lane: prepare, measure the base model, train, measure again, and say in a table what it brought.

In: a recipe. Out: a run directory whose report.md compares base and tuned, and a `LaneResult`.
May import: recipe and every stage room.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropewalk.data import prepare
from ropewalk.errors import UserError
from ropewalk.evaluate import Evaluation, TaskResult, check_files, evaluate
from ropewalk.parallel import started
from ropewalk.recipe import Recipe, load_recipe, resolve
from ropewalk.stage import Stages
from ropewalk.track import RunDirectory
from ropewalk.train import train

SAMPLES = 5
"""Side-by-side answers in the report."""
SMALLER_IS_BETTER = ("perplexity", "bits per byte")


@dataclass(frozen=True)
class Comparison:
    """One measure before and after. `prompt` names the base prompt that did best; None: not measured."""

    measure: str
    on: str
    base: float | None
    prompt: str
    tuned: float

    @property
    def better(self) -> bool | None:
        if self.base is None or self.base == self.tuned:
            return None
        return (self.tuned < self.base) == (self.measure in SMALLER_IS_BETTER)


@dataclass(frozen=True)
class SideBySide:
    """One prompt with both models' answers; `reference` is None for the prompt panel."""

    prompt: str
    reference: str | None
    base: str | None
    tuned: str

    @property
    def answers(self) -> list[tuple[str, str]]:
        """Who said what, on a line of its own."""
        said = (("reference", self.reference), ("base", self.base), ("tuned", self.tuned))
        return [(who, " ".join(text.split()) or "(nothing)") for who, text in said if text is not None]


@dataclass(frozen=True)
class LaneResult:
    """What `run` did. `seconds` is by stage; an interrupted run has no comparisons."""

    run: Path
    interrupted: bool
    comparisons: list[Comparison] = field(default_factory=list)
    samples: list[SideBySide] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str] = (), progress: bool = True
) -> LaneResult:
    """Prepare, evaluate the starting model, train, evaluate the trained one, report.

    The starting model is asked in every way that `evaluate.base` lists, and its best score of each metric
    is the one that counts. A model from scratch is measured after training only. Progress is on stderr.
    Raises UserError for what the recipe has wrong, before any long work where it can be known.
    """
    if started():
        raise UserError(
            "`ropewalk run` starts its processes itself (parallel.shard=2): call it without torchrun"
        )
    recipe = resolve(load_recipe(recipe, overrides)).recipe
    wanted = recipe.evaluate
    check_files(wanted.perplexity, [*wanted.tasks, *wanted.base])
    measures = bool(wanted.perplexity or wanted.tasks or wanted.prompts)
    stages = Stages(2 + measures + (measures and recipe.model.source is not None), progress)

    with stages.next("prepare") as stage:
        prepare(recipe, progress=stage.progress)
    base = None
    if measures and recipe.model.source is not None:
        with stages.next("evaluate the base model") as stage:
            base = evaluate(recipe=recipe, base=True, name="base", progress=stage.progress)
    with stages.next("train"):
        trained = train(recipe, progress=progress)
    if base is not None:
        base.write(trained.run)
    if trained.interrupted or not measures:
        return LaneResult(trained.run, trained.interrupted, seconds=stages.seconds)
    with stages.next("evaluate the tuned model") as stage:
        tuned = evaluate(trained.run, recipe, name="tuned", progress=stage.progress)
    result = LaneResult(trained.run, False, compare(base, tuned), side_by_side(base, tuned), stages.seconds)
    directory = RunDirectory.open(trained.run)
    text = (trained.run / "report.md").read_text(encoding="utf-8")
    directory.write_text("report.md", text.rstrip() + "\n\n" + markdown(result))
    return result


# --- base against tuned ----------------------------------------------------------------------


def compare(base: Evaluation | None, tuned: Evaluation) -> list[Comparison]:
    """Every figure of `tuned` beside the base model's best."""
    found = []
    for path, result in tuned.perplexity.items():
        before = base.perplexity.get(path) if base else None
        name = Path(path).name
        old = (before.perplexity, before.bits_per_byte) if before else (None, None)
        found.append(Comparison("perplexity", name, old[0], "", result.perplexity))
        found.append(Comparison("bits per byte", name, old[1], "", result.bits_per_byte))
    for task in tuned.tasks:
        rivals = _same_questions(base, task)
        for metric, score in task.scores.items():
            scored = [rival for rival in rivals if metric in rival.scores]
            best = max(scored, key=lambda rival: rival.scores[metric], default=None)
            found.append(
                Comparison(
                    metric,
                    f"{task.name} ({len(task.rows)} rows)",
                    best.scores[metric] if best else None,
                    _prompt_name(best),
                    score,
                )
            )
    return found


def _same_questions(base: Evaluation | None, task: TaskResult) -> list[TaskResult]:
    """The base model's results on the rows of a task, whatever they were called and however asked."""
    asked = [row["prompt"] for row in task.rows]
    return [rival for rival in (base.tasks if base else []) if [row["prompt"] for row in rival.rows] == asked]


def _prompt_name(task: TaskResult | None) -> str:
    return "" if task is None else f"{task.name}, {task.shots}-shot" if task.shots else task.name


def side_by_side(base: Evaluation | None, tuned: Evaluation) -> list[SideBySide]:
    """Answers to the same questions, spread evenly over the first task (or the prompt panel): not chosen."""
    if not tuned.tasks:
        old = {sample.prompt: sample.answer for sample in base.panel} if base else {}
        return [SideBySide(s.prompt, None, old.get(s.prompt), s.answer) for s in tuned.panel[:SAMPLES]]
    task = tuned.tasks[0]
    metric = "chrf" if "chrf" in task.scores else next(iter(task.scores))
    best = max(_same_questions(base, task), key=lambda rival: rival.scores.get(metric, 0.0), default=None)
    count = min(SAMPLES, len(task.rows))
    picked = [i * len(task.rows) // count for i in range(count)]
    return [
        SideBySide(
            prompt=task.rows[i]["prompt"],
            reference=task.rows[i]["reference"],
            base=best.rows[i]["answer"] if best else None,
            tuned=task.rows[i]["answer"],
        )
        for i in picked
    ]


def markdown(result: LaneResult) -> str:
    """The comparison as the end of report.md."""
    lines = [
        "## Base against tuned",
        "",
        "| measure | on | base | base prompt | tuned |",
        "|---|---|---|---|---|",
    ]
    for row in result.comparisons:
        old = "-" if row.base is None else f"{row.base:.2f}"
        lines.append(f"| {row.measure} | {row.on} | {old} | {row.prompt} | {row.tuned:.2f} |")
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in result.seconds.items()]
    lines += ["", "## Side by side", ""]
    for sample in result.samples:
        lines += [_fenced(sample.prompt), "", *(f"- {who}: {text}" for who, text in sample.answers), ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.strip()}\n{fence}"
