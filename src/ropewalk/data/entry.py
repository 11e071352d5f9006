"""`ropewalk prepare`: documents to token shards, in a folder named by the content that they were made from.

<data.directory>/<first source>-<fingerprint>/
  train/  validation/     token shards (shards.py); validation only where there is some
  documents.parquet       the ledger: every document that was read, where from, and what became of it
  contamination.json      where data.clean.against is given: what of it is trained on
  report.md
  prepared.json           what it was made from, and the report
<data.directory>/parts/   what was read, its attributes and its tokens, a file for each unit of the input,
                          named by what it was made from (parts.py); may be deleted, and is then made again
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path, PurePath
from typing import Any

from ropewalk.clean.rules import columns_of
from ropewalk.data.attributes import Attributes, Unit
from ropewalk.data.build import LEDGER, Build
from ropewalk.data.catalog import plan_of
from ropewalk.data.cleaning import Cleaner, Plan
from ropewalk.data.contamination import CONTAMINATION, contamination
from ropewalk.data.documents import VERSION, ReadUnit
from ropewalk.data.encode import LAYOUT, EncodeUnit, Options, tokenization
from ropewalk.data.part_files import open_part
from ropewalk.data.parts import Makers, Progress, key
from ropewalk.data.readers import InputFile, Source, cut, files_of, stamp, survey
from ropewalk.data.report import markdown
from ropewalk.data.shards import DamagedDataError, TokenShards
from ropewalk.data.tokenize import Tokenization
from ropewalk.data.view import View, described
from ropewalk.errors import RopewalkError, UserError
from ropewalk.files import atomic_directory, remove_leftovers
from ropewalk.recipe import Recipe, load_recipe

FORMAT = 3
"""Counted up when the same input would give other shards."""
UNIT_BYTES = 32 << 20
"""Bytes of input, as stored, that one worker reads at a time: minutes of work for the slowest step."""

ABANDONED = 24 * 3600
"""Seconds for which nobody writes to a file under a temporary name that a killed process left."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found. `fingerprint` is of all that it was made from; each of the token
    shards has its own, of its content."""

    directory: Path
    fingerprint: str
    train: TokenShards
    validation: TokenShards | None
    report: dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A source, the tasks that read it, and how many files beside them no reader is for."""

    source: Source
    held_out: bool
    tasks: list[ReadUnit]
    ignored: int


class Reading:
    """What is read, where it is kept and how it is judged: `prepare`, `judge` and `prepared_folder` begin so.

    `allowed` bad rows may be in a unit. Raises UserError for sources that cannot be read.
    """

    def __init__(
        self, train: Sequence[Source], validation: Sequence[Source], directory: Path, plan: Plan, allowed: int
    ) -> None:
        if not train:
            raise UserError("data.train: names no source; give at least one")
        plan.needed()  # a mistake in a rule is said before everything is read
        self.directory, self.store, self.plan = directory, (directory / "parts").absolute(), plan
        sources = [*train, *validation]
        self.inputs = [
            Input(source, i >= len(train), self._tasks(source, files, allowed), len(ignored))
            for i, (source, (files, ignored)) in enumerate([(s, files_of(s)) for s in sources])
        ]

    def _tasks(self, source: Source, files: Sequence[InputFile], allowed: int) -> list[ReadUnit]:
        """The tasks that read a source. Where its files lie is no part of their names."""
        stamps = {file.path: stamp(file.path) for file in files}
        surveys = {file.path: survey(file, UNIT_BYTES) for file in files}
        made_from = [VERSION, source.name, list(source.named), self.plan.repair]
        tasks = []
        for unit in cut(source, files, UNIT_BYTES, list(surveys.values())):
            pieces = [[*piece.key(), surveys[piece.file.path].sha256] for piece in unit]
            path = self.store / f"documents-{key([*made_from, pieces])}.parquet"
            held = {piece.file.path: stamps[piece.file.path] for piece in unit}
            weight = sum(piece.size for piece in unit)
            tasks.append(ReadUnit(path, weight, source, unit, held, self.plan.repair, allowed))
        return tasks

    def judged(self, makers: Makers) -> Cleaner:
        """Everything read, and what the rules say of it. Raises UserError for a source without documents."""
        makers.make("read", [task for item in self.inputs for task in item.tasks])
        units = []
        for item in self.inputs:
            name = item.source.name
            found = [Unit(t.path, t.weight, t.files, item.held_out, name) for t in item.tasks]
            if not any(len(unit.read()) for unit in found):
                raise UserError(f"{item.source.path}: no documents in it (data source {name})")
            units += found
        remove_leftovers(self.store, ABANDONED)
        remove_leftovers(self.directory, ABANDONED, f"*-{'?' * 12}.{'?' * 8}")  # folders of `target`
        cleaner = Cleaner(Attributes(self.store, units, makers), self.plan)
        cleaner.run()
        return cleaner

    def made_from(self, tokenizer: Any, options: Options) -> dict[str, Any]:
        """What decides what the shards hold, and nothing else: not where files lie, not how many workers."""
        sources = [
            {
                "name": item.source.name,
                "columns": list(item.source.named),
                "held_out": item.held_out,
                "units": [task.path.stem for task in item.tasks],
            }
            for item in self.inputs
        ]
        values = asdict(options)
        if not options.validation_fraction:
            del values["seed"]
        made_with = [
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
        ]
        digest = hashlib.sha256(json.dumps(made_with, sort_keys=True, default=str).encode()).hexdigest()
        return {
            "format": FORMAT,
            "sources": sources,
            "tokenizer": digest,
            "options": values,
            "clean": self.plan.made_from(),
        }

    def target(self, made_from: Mapping[str, Any]) -> tuple[Path, str]:
        """(folder, fingerprint) of what is prepared."""
        fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return self.directory / f"{folder_slug(self.inputs[0].source.name)}-{fingerprint[:12]}", fingerprint


def prepare(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    on: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """The recipe's data as token shards; made only where they are not there whole (or with `overwrite`).

    `on`: "dask" or "dask:ADDRESS" for a Dask cluster, which must see the same files; the result is the same.
    `progress(what, done, of)`. Raises UserError that names file and line for data that cannot be used,
    RopewalkError for a full disk.
    """
    recipe = load_recipe(recipe, overrides)
    return prepare_sources(
        *_sources(recipe),
        *_tokenizer_and_options(recipe),
        Path(recipe.data.directory),
        plan=plan_of(recipe.data.clean.model_dump()),
        workers=recipe.data.workers,
        on=on,
        overwrite=overwrite,
        progress=progress,
    )


def _tokenizer_and_options(recipe: Recipe) -> tuple[Any, Options]:
    from ropewalk.model import load_tokenizer  # it brings torch along, which reading and cleaning do without

    data = recipe.data
    origin = recipe.model.tokenizer or recipe.model.source
    assert origin is not None  # the schema sees to it
    tokenizer = load_tokenizer(origin, recipe.model.revision, data.chat_template)
    return tokenizer, Options(
        data.sequence_length,
        0.0 if data.validation else data.validation_fraction,
        recipe.seed,
        "keep" if data.packing == "concat" else data.too_long,
        data.score,
        data.append_eos,
        data.max_bad_rows,
    )


def _sources(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """(train, validation)."""
    parts = recipe.data.train, recipe.data.validation
    train, held = ([source.model_dump(exclude={"weight"}) for source in part] for part in parts)
    return name_sources(train), name_sources(held)


def name_sources(sources: Sequence[Mapping[str, Any]]) -> list[Source]:
    """By the last part of its path where a source has no name; a name met before gets a number."""
    named: list[Source] = []
    for source in sources:
        wanted = name = source.get("name") or PurePath(source["path"]).name or "data"  # "." has no name
        numbers = count(len(named) + 1)
        while any(other.name == name for other in named):
            name = f"{wanted} ({next(numbers)})"
        named.append(Source(**{**source, "name": name}))
    return named


def prepare_sources(
    train: Sequence[Source],
    validation: Sequence[Source],
    tokenizer: Any,
    options: Options,
    directory: Path,
    *,
    plan: Plan | None = None,
    workers: int = 0,
    on: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """As `prepare`, from plain values. `plan` is how documents are cleaned; workers change no result."""
    tokenize = tokenization(tokenizer, options)
    plan = Plan() if plan is None else plan  # a plan that only repairs is false
    reading = Reading(train, validation, directory, plan, options.max_bad_rows)
    made_from = reading.made_from(tokenizer, options)
    target, fingerprint = reading.target(made_from)
    if target.exists() and not overwrite:
        try:
            return _open(target, fingerprint, verify=True)
        except DamagedDataError as error:
            logging.getLogger(__name__).warning("%s: is damaged, and made anew (%s)", target, error)
    with Makers(workers, on, progress) as makers:
        cleaner = reading.judged(makers)
        encodes = _encodes(cleaner, tokenize, options, makers.workers, made_from)
        makers.make("tokenize", encodes, here=True)
    with atomic_directory(target, overwrite=True) as folder:
        build = Build(folder, tokenizer, options, tokenize.has_template)
        for unit, verdict, encode in zip(cleaner.units, cleaner.verdicts, encodes, strict=True):
            build.add(unit, verdict, encode.path)
        for item in reading.inputs:
            if item.ignored:
                ignored = f"{item.ignored:,} files of other kinds were left alone"
                build.tally.notes.append(f"{item.source.name}: {ignored}")
        report = build.finish()
        if plan:
            report["cleaning"] = cleaner.report()
        if plan.sets:
            report["contamination"] = contamination(cleaner)
            trained = contamination(cleaner, trained=True)
            (folder / CONTAMINATION).write_text(json.dumps(trained, indent=1), encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        account = {"fingerprint": fingerprint, "made_from": made_from, "report": report}
        account["parts"] = described(cleaner)
        text = json.dumps(account, indent=1, ensure_ascii=False)
        (folder / "prepared.json").write_text(text, encoding="utf-8")
    return _open(target, fingerprint, verify=False)


def judge(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    also: Sequence[str] = (),
    on: str | None = None,
    progress: Progress | None = None,
) -> View:
    """The recipe's documents, and what its rules would drop, without tokenizing any. Raises as `prepare`.

    `also`: expressions whose attributes are measured too. What was read and measured is kept (in parts/), so
    that other thresholds take seconds.
    """
    recipe = load_recipe(recipe, overrides)
    data = recipe.data
    plan = plan_of(data.clean.model_dump())
    asked = [name for one in also for name in columns_of(one, "expression")]
    plan = replace(plan, asked=(*plan.asked, *asked))
    reading = Reading(*_sources(recipe), Path(data.directory), plan, data.max_bad_rows)
    with Makers(data.workers, on, progress) as makers:
        cleaner = reading.judged(makers)
    return View(reading.store, described(cleaner), cleaner.report() if plan else None)


def prepared_folder(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Where `prepare` has put this recipe's data. Raises UserError where it has not yet."""
    recipe = load_recipe(recipe, overrides)
    plan = plan_of(recipe.data.clean.model_dump())
    tokenizer, options = _tokenizer_and_options(recipe)
    reading = Reading(*_sources(recipe), Path(recipe.data.directory), plan, options.max_bad_rows)
    target, _ = reading.target(reading.made_from(tokenizer, options))
    if not (target / "prepared.json").is_file():
        raise UserError(f"{target}: not prepared yet; run ropewalk prepare with this recipe first")
    return target


def folder_slug(name: str) -> str:
    """What the folder of data begins with whose first source has this name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(name).stem)[:80].strip("-") or "data"


def tokenization_of(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """(tokenizer, how it is used): a document's tokens as `prepare` would make them."""
    tokenizer, options = _tokenizer_and_options(load_recipe(recipe, overrides))
    return tokenizer, tokenization(tokenizer, options)


def _encodes(
    cleaner: Cleaner, tokenize: Tokenization, options: Options, workers: int, made_from: Mapping[str, Any]
) -> list[EncodeUnit]:
    values = {
        k: v for k, v in asdict(options).items() if k not in ("validation_fraction", "seed", "max_bad_rows")
    }
    common = [made_from["format"], LAYOUT, made_from["tokenizer"], values]
    tasks = []
    for unit, verdict in zip(cleaner.units, cleaner.verdicts, strict=True):
        name = key([*common, unit.documents.name, verdict and verdict.name])
        path = cleaner.attributes.store / f"tokens-{name}.parquet"
        task = EncodeUnit(path, unit.weight, unit.documents, verdict, unit.files, tokenize, options, workers)
        tasks.append(task)
    return tasks


def _open(directory: Path, fingerprint: str, verify: bool) -> Prepared:
    """Raises DamagedDataError for a folder that is not whole; `verify` reads every byte of it."""
    account = directory / "prepared.json"
    try:
        found = json.loads(account.read_text(encoding="utf-8"))
        report = found["report"]
        names = [name for name in ("train", "validation") if report[name]]
        if found["fingerprint"] != fingerprint or "train" not in names:
            raise DamagedDataError(f"{account}: belongs to other data")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedDataError(f"{account}: {error}") from None
    try:
        open_part(directory / LEDGER)
    except RopewalkError as error:
        raise DamagedDataError(str(error)) from None
    parts = [TokenShards.open(directory / name) for name in names]
    for part in parts if verify else ():
        part.verify()
    return Prepared(directory, fingerprint, parts[0], parts[1] if len(parts) > 1 else None, report)
