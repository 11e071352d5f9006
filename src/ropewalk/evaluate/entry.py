"""`ropewalk eval`: all that a recipe's `evaluate` section asks for, on one model, kept in two files."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.data.contamination import CONTAMINATION
from ropewalk.data.readers import Source, files_of
from ropewalk.errors import UserError
from ropewalk.evaluate.clean_subset import contaminated_rows, read_account
from ropewalk.evaluate.panel import Sample, panel_markdown, run_panel
from ropewalk.evaluate.perplexity import PerplexityResult, perplexity
from ropewalk.evaluate.tasks import TaskResult, run_task
from ropewalk.files import atomic_write, read_json_object
from ropewalk.model import Transformer, load_model, load_tokenizer
from ropewalk.recipe import Recipe, load_recipe, resolve

Progress = Callable[[str, int, int], None]
"""(what is measured, done, of)"""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one model. `perplexity` is by file; scores of tasks are from 0 to 100."""

    name: str
    source: str
    perplexity: dict[str, PerplexityResult]
    tasks: list[TaskResult]
    panel: list[Sample]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, rows included, as JSON-able values."""
        return {
            "name": self.name,
            "source": self.source,
            "seconds": round(self.seconds, 2),
            "perplexity": {path: result.as_dict() for path, result in self.perplexity.items()},
            "tasks": [task.as_dict() for task in self.tasks],
            "panel": [{"prompt": sample.prompt, "answer": sample.answer} for sample in self.panel],
        }

    def table(self) -> str:
        """The figures as a Markdown table, without the tasks' rows; empty where only the panel was asked."""
        lines = []
        for path, result in self.perplexity.items():
            lines.append(f"| perplexity | {Path(path).name} | {result.perplexity:.3f} |")
            lines.append(f"| bits per byte | {Path(path).name} | {result.bits_per_byte:.4f} |")
        for task in self.tasks:
            on = f"{task.name} ({len(task.rows)} rows, {task.shots}-shot)"
            lines += [f"| {metric} | {on} | {score:.2f} |" for metric, score in task.scores.items()]
            if task.clean is not None:
                on = f"{task.name} ({task.clean.rows} of {len(task.rows)} rows not in the training data)"
                lines += [f"| {metric} | {on} | {score:.2f} |" for metric, score in task.clean.scores.items()]
        return "\n".join(["| measure | on | value |", "|---|---|---|", *lines, ""]) if lines else ""

    def markdown(self) -> str:
        """A page to read: the table, then the prompt panel."""
        head = f"# Evaluation: {self.name}\n\nModel: `{self.source}`. Took {self.seconds:.0f} s.\n"
        panel = f"## Prompt panel\n\n{panel_markdown(self.panel)}" if self.panel else ""
        return "\n".join(part for part in (head, self.table(), panel) if part)

    def write(self, directory: str | Path) -> Path:
        """Writes `evaluation-NAME.json` and `evaluation-NAME.md`; the path of the first."""
        path = Path(directory) / f"evaluation-{self.name}.json"
        atomic_write(path.with_suffix(".md"), self.markdown())
        atomic_write(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        return path


def evaluate(
    source: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    loaded: tuple[Transformer, Any] | None = None,
    base: bool = False,
    directory: str | Path | None = None,
    contamination: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures the model at `source` (a run, or anything `load_model` takes) as `recipe.evaluate` says.

    Without `source` it is the recipe's own starting model, without `recipe` the run's. `base` asks the
    tasks in `evaluate.base` where there are any. `loaded` is (model, tokenizer) of `source`, to save
    loading it. The result is written to `directory`, by default the run's; where there is none, it is
    only returned. `contamination` is an account of which rows are in the training data, by default that of
    the run's prepared data where they have one: tasks it knows are scored on the other rows too.
    Raises UserError where there is nothing to measure, and before any work where the result exists (unless
    `overwrite`).
    """
    run = Path(source) if source is not None and (Path(source) / "recipe.yaml").is_file() else None
    if recipe is None:
        if run is None:
            raise UserError(
                f"{source or 'eval'}: not a run; give the recipe that says what to measure (--recipe)"
            )
        recipe = run / "recipe.yaml"
    resolved = resolve(load_recipe(recipe, overrides)).recipe
    wanted = resolved.evaluate
    tasks = wanted.base if base and wanted.base else wanted.tasks
    if not (wanted.perplexity or tasks or wanted.prompts):
        raise UserError("the recipe's evaluate section is empty; give evaluate.perplexity, tasks or prompts")
    origin = source if source is not None else resolved.model.source
    if origin is None:
        raise UserError("the recipe's model is made from scratch; name the run to evaluate")
    name = name or (run.name if run is not None else "base" if source is None else Path(source).stem)
    if Path(name).name != name:
        raise UserError(f"--name {name}: the name of a file in the run's folder, not a path")
    directory = directory if directory is not None else run
    existing = None if directory is None else Path(directory) / f"evaluation-{name}.json"
    if existing is not None and existing.exists() and not overwrite:
        raise UserError(f"{existing} exists; give --overwrite to replace it")
    check_files(wanted.perplexity, tasks)
    account = contamination or _account_of(run)
    known = {} if account is None else read_account(account)
    model, tokenizer = loaded or _load(str(origin), resolved, same=source is None)
    evaluation = _measure(model, tokenizer, resolved, tasks, known, name, str(origin), progress)
    if directory is not None:
        evaluation.write(directory)
    return evaluation


def _account_of(run: Path | None) -> Path | None:
    """The account of contamination in the folder of data that a run was trained on, where there is one."""
    if run is None or not (run / "lineage.json").is_file():
        return None
    data = read_json_object(run / "lineage.json").get("data")
    directory = data.get("directory") if isinstance(data, dict) else None
    account = Path(directory) / CONTAMINATION if isinstance(directory, str) else None
    return account if account is not None and account.is_file() else None


def check_files(perplexity_paths: Sequence[str], tasks: Sequence[Any]) -> None:
    """UserError for a file that is missing, with the field it is named in: better now than after the work."""
    for path in perplexity_paths:
        files_of(Source(path, "evaluate.perplexity"))
    for task in tasks:
        files_of(Source(task.path, f"path of task {task.name}"))
        if task.shots_path is not None:
            files_of(Source(task.shots_path, f"shots_path of task {task.name}"))


def _load(source: str, recipe: Recipe, same: bool) -> tuple[Transformer, Any]:
    """The model in the recipe's precision and place; `same`: it is the one that recipe.model describes."""
    revision = recipe.model.revision if same else None
    model = load_model(source, dtype=recipe.train.precision, device=recipe.train.device, revision=revision)
    own, template = (recipe.model.tokenizer, recipe.data.chat_template) if same else (None, None)
    return model, load_tokenizer(own or source, revision, template)


def _measure(
    model: Transformer,
    tokenizer: Any,
    recipe: Recipe,
    tasks: Sequence[Any],
    account: Mapping[str, frozenset[int]],
    name: str,
    source: str,
    progress: Progress | None,
) -> Evaluation:
    def part(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, of: progress(what, done, of)

    wanted, start = recipe.evaluate, time.perf_counter()
    window = wanted.window or recipe.data.sequence_length
    stride = wanted.stride or max(1, window // 2)
    figures = {
        path: perplexity(model, tokenizer, path, window, stride, part(f"perplexity of {Path(path).name}"))
        for path in wanted.perplexity
    }
    results = [
        run_task(
            model,
            tokenizer,
            **dict(task),
            batch_size=wanted.batch_size,
            contaminated=contaminated_rows(account, task.path) if account else None,
            progress=part(task.name),
        )
        for task in tasks
    ]
    panel = run_panel(model, tokenizer, wanted.prompts, wanted.max_new_tokens, wanted.batch_size)
    return Evaluation(name, source, figures, results, panel, time.perf_counter() - start)
