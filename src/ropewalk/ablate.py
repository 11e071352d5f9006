"""Does a cleaning rule make a better model? Small runs with it and without it, on as many tokens, compared.

In: a recipe and a part of its data.clean. Out: an `Ablation`: what both kinds of run reach on documents that
neither was trained on, the same for both, with the noise of several seeds; kept as JSON and Markdown.
May import: recipe, track and every stage room.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ropewalk import make_callable
from ropewalk.data import Loader, Prepared, TokenShards, prepare
from ropewalk.data.leave_out import leave_out, nothing
from ropewalk.data.readers import Source, files_of
from ropewalk.errors import RopewalkError, UserError
from ropewalk.evaluate import evaluate as evaluate_run
from ropewalk.evaluate.ablation import Ablation, Variant, sides_of
from ropewalk.evaluate.paired import Paired
from ropewalk.files import atomic_write, sha256
from ropewalk.model import load_model, load_tokenizer
from ropewalk.parallel import started
from ropewalk.recipe import Recipe, load_recipe, resolve, to_yaml
from ropewalk.stage import Stage, Stages
from ropewalk.track import RunDirectory
from ropewalk.train import resume, train
from ropewalk.train.build import DTYPES
from ropewalk.train.entry import anchored, planned
from ropewalk.train.validate import validation_loss

SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""`--model-config small`: 0.8 million parameters besides the embedding."""
REPEATS = 4
"""Passes over the same text up to which they are worth about as much as new text (arXiv 2305.16264)."""
NAMED = "loss on data.validation"
RULED = "loss on held-out documents, prepared with all rules"
UNRULED = "loss on held-out documents, as they were read"


def ablate(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    without: str,
    seeds: int = 3,
    evaluate: bool = False,
    model_config: str | Path | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Ablation:
    """Trains `seeds` pairs of runs, with all of data.clean and with `without` left out, and compares them.

    Both runs of a pair have the same seed and length. They are measured on the recipe's data.validation, or
    else on documents that are split off: twice, as all rules would have them and as they were read.
    `evaluate`: and on what the recipe's evaluate section says. `model_config`: the shape of a model from
    scratch that takes the place of the recipe's; "small", a file, or fields.
    Runs lie in recipe.runs; one that is there, of the same recipe and data, is not trained again.
    Raises UserError for what the recipe has wrong, before anything is trained.
    """
    if started():
        raise UserError("ablate starts the processes of its runs itself: call it without torchrun")
    recipe = _with_model(load_recipe(recipe, overrides), model_config)
    _check(recipe, seeds, evaluate)
    stages = Stages(1 + 4 * seeds, progress)
    with stages.next("prepare the data") as stage:
        pairs = [_pair(recipe, without, recipe.seed + i, evaluate, stage) for i in range(seeds)]
    names = sides_of(without)
    found = Ablation(
        without=without,
        seeds=tuple(pair.seed for pair in pairs),
        tokens=_tokens(recipe),
        variants=tuple(
            _variant(recipe, name, side) for name, side in zip(names, pairs[0].sides, strict=True)
        ),
        notes=tuple(_notes(recipe, without, pairs[0])),
    )
    if all(pair.equal for pair in pairs):
        nothing_done = f"leaving {without} out changes no training document: there is nothing to compare"
        return _kept(replace(found, notes=(nothing_done,)), recipe)
    runs: list[Path] = []
    for pair in pairs:
        for name, side in zip(names, pair.sides, strict=True):
            with stages.next(f"train with {name}, seed {pair.seed}"):
                run, stopped = _run(side, progress)
            if stopped:
                return replace(found, interrupted=run)
            runs.append(run)
    measured: list[dict[str, tuple[float, bool]]] = []
    for i, run in enumerate(runs):
        pair, which = pairs[i // 2], i % 2
        with stages.next(f"measure {run.name}") as stage:
            figures = _measure(run, pair.sides[which].recipe, pair.held_out, evaluate, stage)
            measured.append(figures)
    values = {name: [one[name][0] for one in measured] for name in measured[0]}
    measures = tuple(
        Paired(name, tuple(values[name][::2]), tuple(values[name][1::2]), smaller)
        for name, (_, smaller) in measured[0].items()
    )
    return _kept(replace(found, measures=measures, runs=tuple(runs)), recipe)


# --- what is compared ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """The recipe of a run, and its data."""

    recipe: Recipe
    prepared: Prepared


@dataclass(frozen=True)
class _Pair:
    """Two runs with one seed, and by name of the measure the documents that both are measured on."""

    seed: int
    sides: tuple[_Side, _Side]
    held_out: dict[str, TokenShards]

    @property
    def equal(self) -> bool:
        before, after = (side.prepared.train.fingerprint for side in self.sides)
        return before == after


def _pair(recipe: Recipe, without: str, seed: int, evaluate: bool, stage: Stage) -> _Pair:
    clean = recipe.data.clean.model_dump()
    sides = []
    for name, values in (("all-rules", clean), (_without(without), leave_out(clean, without))):
        own = _cleaned(recipe, values)
        own = own.model_copy(update={"name": f"{recipe.name}.{name}.seed{seed}", "seed": seed})
        sides.append(_Side(own, prepare(own, progress=stage.progress)))
    before, after = sides
    held_out: dict[str, TokenShards | None] = {}
    if recipe.data.validation:
        held_out[NAMED] = before.prepared.validation
        seen = [side.prepared.validation for side in sides]
        if len({shards if shards is None else shards.fingerprint for shards in seen}) > 1:  # never cleaned
            raise RopewalkError("data.validation became different documents in the two variants")
    elif recipe.data.validation_fraction:
        held_out[RULED] = before.prepared.validation
        plain = _cleaned(before.recipe, nothing(clean))
        held_out[UNRULED] = prepare(plain, progress=stage.progress).validation
    if RULED in held_out and len({shards and shards.fingerprint for shards in held_out.values()}) == 1:
        del held_out[RULED]  # the rules drop nothing of it
    there = {name: shards for name, shards in held_out.items() if shards is not None}
    if not there and not evaluate:
        raise UserError(
            "there is nothing to measure on: name data.validation, raise data.validation_fraction, or give "
            "--evaluate for what the recipe's evaluate section says"
        )
    return _Pair(seed, (before, after), there)


def _without(name: str) -> str:
    """As a part of a file's name."""
    return "without-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _cleaned(recipe: Recipe, clean: Mapping[str, Any]) -> Recipe:
    section = recipe.data.clean.model_validate(clean)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"clean": section})})


def _with_model(recipe: Recipe, config: str | Path | Mapping[str, Any] | None) -> Recipe:
    """With a model from scratch in place of the recipe's; its tokenizer stays."""
    if config is None:
        return recipe
    origin = recipe.model.tokenizer or recipe.model.source
    assert origin is not None  # the schema sees to it
    if config == "small":
        tokens = len(load_tokenizer(origin, recipe.model.revision))
        room = {
            "vocab_size": 64 * math.ceil(tokens / 64),
            "max_position_embeddings": recipe.data.sequence_length,
        }
        config = {**SMALL, **room}
    values = recipe.model_dump(exclude_unset=True, exclude={"model", "adapt"})  # there is nothing to adapt
    shape = dict(config) if isinstance(config, Mapping) else str(config)
    return load_recipe({**values, "model": {"config": shape, "tokenizer": origin}})


def _check(recipe: Recipe, seeds: int, evaluate: bool) -> None:
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: one run of each kind shows no noise; give at least 2, better 3")
    if recipe.train.epochs is not None:
        raise UserError(
            "train.epochs: of less data an epoch is fewer tokens, and all runs must see as many; "
            "give train.tokens=N instead"
        )
    wanted = recipe.evaluate
    if evaluate and not (wanted.perplexity or wanted.tasks):
        raise UserError("--evaluate: the recipe's evaluate section has neither perplexity nor tasks")


def _tokens(recipe: Recipe) -> int:
    train = resolve(recipe).recipe.train
    assert train.batch_size is not None  # resolved
    rows, length = train.batch_size, recipe.data.sequence_length
    return rows * length * (train.steps or math.ceil((train.tokens or 0) / (rows * length)))


def _variant(recipe: Recipe, name: str, side: _Side) -> Variant:
    report = side.prepared.report["train"]
    return Variant(name, report["documents"], report["tokens"], _tokens(recipe) / report["tokens"])


def _notes(recipe: Recipe, without: str, pair: _Pair) -> Iterator[str]:
    if RULED in pair.held_out:
        yield (
            "the held-out documents are of the same sources, and a model is best on what it was trained on: "
            "prepared with all rules they are such as the rules ask for, and as they were read they have "
            "what the rules drop; data.validation, text that the model is wanted for, favours neither"
        )
    if without in ("exact", "near", "paragraphs", "lines", "passages", "against"):
        yield (
            f"without {without}, copies of what is measured on may be among the training documents: a lower "
            "loss may be memory"
        )
    most = max(_tokens(recipe) / side.prepared.report["train"]["tokens"] for side in pair.sides)
    if most > REPEATS:
        yield (
            f"documents are seen up to {most:.1f} times: with less data more often, which over {REPEATS} "
            "times is worth less and less (arXiv 2305.16264)"
        )


# --- runs ------------------------------------------------------------------------------------


def _run(side: _Side, progress: bool) -> tuple[Path, bool]:
    """(the run of this recipe and data, whether a signal stopped it): found finished, or finished now."""
    found = _find(side)
    if found is not None and (found / "report.md").exists():
        return found, False
    result = train(side.recipe, progress=progress) if found is None else resume(found, progress=progress)
    return result.run, result.interrupted


def _find(side: _Side) -> Path | None:
    """A run by what it was made from, whenever and by whichever command that was."""
    wanted = to_yaml(anchored(resolve(planned(side.recipe)).recipe))
    folders = sorted(Path(side.recipe.runs).glob(f"{side.recipe.name}-*/recipe.yaml"))
    for path in folders:
        run = RunDirectory.open(path.parent)
        data = (run.read_json("lineage.json") or {}).get("data", {})
        same = data.get("fingerprint") == side.prepared.fingerprint
        if same and path.read_text(encoding="utf-8") == wanted:
            return run.path
    return None


def _measure(
    run: Path, recipe: Recipe, held_out: Mapping[str, TokenShards], evaluate: bool, stage: Stage
) -> dict[str, tuple[float, bool]]:
    """Name of each measure -> (value, whether smaller is better)."""
    found = {name: (_loss(run, recipe, shards), True) for name, shards in held_out.items()}
    if not evaluate:
        return found
    name = evaluation_name(recipe)
    path = run / f"evaluation-{name}.json"
    if not path.exists():
        evaluate_run(run, name=name, progress=stage.progress)
    return found | figures_of(json.loads(path.read_text(encoding="utf-8")))


def evaluation_name(recipe: Recipe) -> str:
    """Another one where a file that the recipe's evaluate section names was changed: runs are shared by
    ablations, and their figures must be of the same files."""
    section, paths = recipe.evaluate, []
    for source in section.perplexity:
        paths += [file.path for file in files_of(Source(source, "evaluate.perplexity"))[0]]
    for task in section.tasks:
        paths += [str(path) for path in (task.path, task.shots_path) if path is not None]
    digests = [sha256(path) if Path(path).is_file() else path for path in paths]  # or it is a URL
    return f"ablation-{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:8]}"


def figures_of(result: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """Of an evaluation as it is written: name of each measure -> (value, whether smaller is better)."""
    found: dict[str, tuple[float, bool]] = {}
    short = Counter(Path(name).name for name in result["perplexity"])
    for path, figures in result["perplexity"].items():
        name = Path(path).name if short[Path(path).name] == 1 else path
        found[f"bits per byte of {name}"] = figures["bits_per_byte"], True
    for task in result["tasks"]:
        for metric, score in task["scores"].items():
            found[f"{metric} of {task['name']}"] = score, False
    return found


def _loss(run: Path, recipe: Recipe, shards: TokenShards) -> float:
    """Mean loss per scored token of the same rows for every run: as many as are a tenth of those that it was
    trained on, train.evaluate_rows at least, or all there are."""
    resolved = resolve(recipe).recipe
    train, data = resolved.train, resolved.data
    device = torch.device("cuda" if train.device == "cuda" else "cpu")
    tokenizer = load_tokenizer(run)
    loader = Loader(shards, data.sequence_length, data.packing, 1, pad_id=tokenizer.pad_token_id or 0)
    result = validation_loss(
        load_model(run, DTYPES[train.precision], device),
        loader,
        rows=max(train.evaluate_rows, _tokens(recipe) // (10 * data.sequence_length)),
        micro_batch=train.micro_batch_size or 1,
        chunk=train.loss_chunk,
        device=device,
    )
    assert result is not None  # nothing asked it to stop
    return result[0]


# --- what is kept and said -------------------------------------------------------------------


def _kept(found: Ablation, recipe: Recipe) -> Ablation:
    """Written beside the runs."""
    path = Path(recipe.runs) / f"{recipe.name}.{_without(found.without)}.md"
    atomic_write(path, found.markdown(recipe.name))
    atomic_write(path.with_suffix(".json"), json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n")
    return replace(found, report=path)


make_callable(__name__)  # rw.ablate is this module and the function
