"""`ropewalk prepare`: documents to token shards, in a folder named by the content that they were made from.

<data.directory>/<first source>-<fingerprint>/
  train/  validation/     token shards (shards.py); validation only where there is some
  report.md
  prepared.json           what it was made from, and the report
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ropewalk.data.build import Build, Options
from ropewalk.data.readers import InputFile, Source, files_of
from ropewalk.data.report import markdown
from ropewalk.data.shards import DamagedDataError, TokenShards
from ropewalk.errors import RopewalkError, UserError
from ropewalk.files import atomic_directory, sha256
from ropewalk.model import load_tokenizer
from ropewalk.recipe import Recipe, load_recipe

FORMAT = 1
"""Counted up when the same input would give other shards."""


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
    """A source, its files, and what lies beside them that no reader is for."""

    source: Source
    files: list[InputFile]
    ignored: list[Path]
    held_out: bool


def prepare(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """The recipe's data as token shards; made only where they are not there whole (or with `overwrite`).

    `progress(what, done, of)`. Raises UserError that names file and line for data that cannot be used,
    RopewalkError for a full disk.
    """
    recipe = load_recipe(recipe, overrides)
    data = recipe.data
    origin = recipe.model.tokenizer or recipe.model.source
    assert origin is not None  # the schema sees to it
    tokenizer = load_tokenizer(origin, recipe.model.revision, data.chat_template)
    options = Options(
        data.sequence_length,
        0.0 if data.validation else data.validation_fraction,
        recipe.seed,
        "keep" if data.packing == "concat" else data.too_long,
        data.score,
        data.append_eos,
        data.max_bad_rows,
    )
    return prepare_sources(
        name_sources([source.model_dump(exclude={"weight"}) for source in data.train]),
        name_sources([source.model_dump() for source in data.validation]),
        tokenizer,
        options,
        Path(data.directory),
        workers=data.workers,
        overwrite=overwrite,
        progress=progress,
    )


def name_sources(sources: Sequence[Mapping[str, Any]]) -> list[Source]:
    """By the last part of its path where a source has no name; a name met before gets a number."""
    named: list[Source] = []
    for source in sources:
        wanted = name = source.get("name") or PurePath(source["path"]).name
        while any(other.name == name for other in named):
            name = f"{wanted} ({len(named) + 1})"
        named.append(Source(**{**source, "name": name}))
    return named


def prepare_sources(
    train: Sequence[Source],
    validation: Sequence[Source],
    tokenizer: Any,
    options: Options,
    directory: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """As `prepare`, from plain values. `workers` threads render and tokenize; they change no result."""
    if not train:
        raise UserError("data.train: names no source; give at least one")
    inputs = [Input(s, *files_of(s), held_out=i >= len(train)) for i, s in enumerate([*train, *validation])]
    made_from = _made_from(inputs, tokenizer, options)
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePath(train[0].name).stem).strip("-") or "data"
    target = directory / f"{slug}-{fingerprint[:12]}"
    if target.exists() and not overwrite:
        try:
            return _open(target, fingerprint, verify=True)
        except DamagedDataError as error:
            logging.getLogger(__name__).warning("%s: is damaged, and made anew (%s)", target, error)
    stamps = {file.path: _stamp(file.path) for item in inputs for file in item.files}
    with atomic_directory(target, overwrite=True) as folder:
        build = Build(folder, tokenizer, options, workers, progress, sum(size for size, _ in stamps.values()))
        for item in inputs:
            build.add(item.source, item.files, item.held_out)
            if item.ignored:
                build.note(f"{item.source.name}: {len(item.ignored):,} files of other kinds were left alone")
        for path, stamp in stamps.items():
            if _stamp(path) != stamp:
                raise RopewalkError(f"{path}: changed while it was read; prepare the data again")
        report = build.finish()
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        account = {"fingerprint": fingerprint, "made_from": made_from, "report": report}
        text = json.dumps(account, indent=1, ensure_ascii=False)
        (folder / "prepared.json").write_text(text, encoding="utf-8")
    return _open(target, fingerprint, verify=False)


def _made_from(inputs: Sequence[Input], tokenizer: Any, options: Options) -> dict[str, Any]:
    """What decides what the shards hold, and nothing else: not where files lie, not how many workers."""
    sources = []
    for item in inputs:
        try:
            files = [[file.name, sha256(file.path)] for file in item.files]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
        source = {"name": item.source.name, "columns": list(item.source.named), "held_out": item.held_out}
        sources.append({**source, "files": files})
    values = asdict(options)
    if not options.validation_fraction:
        del values["seed"]
    made_with = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True, default=str).encode()).hexdigest()
    return {"format": FORMAT, "sources": sources, "tokenizer": digest, "options": values}


def _stamp(path: Path) -> tuple[int, int]:
    """(size, time of the last change in nanoseconds)."""
    try:
        stat = path.stat()
    except OSError as error:
        raise RopewalkError(f"{path}: {error.strerror}; it was there a moment ago") from None
    return stat.st_size, stat.st_mtime_ns


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
    parts = [TokenShards.open(directory / name) for name in names]
    for part in parts if verify else ():
        part.verify()
    return Prepared(directory, fingerprint, parts[0], parts[1] if len(parts) > 1 else None, report)
