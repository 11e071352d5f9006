"""YAML file, dictionary or Recipe, with overrides, to a checked Recipe; every mistake in one message."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from ropewalk.errors import UserError
from ropewalk.recipe.document import Document, Key, apply_overrides, dotted, from_mapping, read_file
from ropewalk.recipe.fields import ALIASES, all_fields, bare, field_at, is_list, section_of, suggest, wanted
from ropewalk.recipe.schema import Recipe

EXCLUSIVE = (
    ("train.steps", "train.epochs", "train.tokens"),
    ("train.batch_size", "train.batch_tokens"),
    ("model.source", "model.config"),
)
"""Of each group a recipe has one; an override of one takes the place of the others."""


@dataclass(frozen=True)
class Origin:
    """Where a value of a recipe comes from."""

    kind: Literal["default", "file", "given", "override", "derived"]
    where: str = ""
    """`recipes/x.yaml:14`, or the override as it was typed."""
    why: str = ""
    """What a derived value was derived from."""


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, a dictionary or a Recipe, with `a.b=c` overrides.

    Relative paths inside a recipe are relative to the current directory, as on a command line.
    Raises UserError that lists all of its mistakes, each with its line and the closest right name.
    """
    return load_with_origins(source, overrides)[0]


def load_with_origins(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> tuple[Recipe, dict[str, Origin]]:
    """A recipe, and where each value that is not a default came from, by dotted name."""
    if isinstance(source, Recipe):
        document = from_mapping(source.model_dump(exclude_unset=True))
    elif isinstance(source, Mapping):
        document = from_mapping(source)
    else:
        document = read_file(source)
    apply_overrides(document, overrides, EXCLUSIVE)
    _fill_empty_sections(document)
    recipe = _validate(document)
    origins = {dotted(key): Origin(where.kind, where.text) for key, where in document.where.items()}  # type: ignore[arg-type]
    return recipe, origins


def _fill_empty_sections(document: Document) -> None:
    """`train:` with every line under it commented out is null in YAML, and means an empty section."""
    for name, field in all_fields().items():
        *above, last = name.split(".")
        if section_of(field.annotation) and not is_list(field.annotation) and "0" not in above:
            holder: Any = document.values
            for part in above:
                holder = holder.get(part) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and last in holder and holder[last] is None:
                holder[last] = {}


def _validate(document: Document) -> Recipe:
    problems = document.problems
    recipe, errors = _try(document)
    if errors and _take_text_as_written(document, errors):
        recipe, errors = _try(document)
    unknown = [_key_of(error["loc"]) for error in errors if error["type"] == "extra_forbidden"]
    misspelled = {suggest(key) for key in unknown}
    told: set[Key] = set()
    for error in errors:
        key = _key_of(error["loc"])
        if error["type"] == "missing" and dotted(key) in misspelled:
            continue  # it is there, under a wrong name, which is said
        # Each member of a union complains; and what is inside a wrong section is not news.
        if not any(key[:n] in told for n in range(1, len(key) + 1)) or error["type"] == "value_error":
            told.add(key)
            problems.append(_describe(error, key, document))
    if problems:
        if len(problems) == 1:
            raise UserError(problems[0])
        title = f"{document.name or 'the recipe'}: {len(problems)} problems"
        raise UserError("\n  ".join([title, *problems]))
    assert recipe is not None
    return recipe


def _try(document: Document) -> tuple[Recipe | None, list[Any]]:
    try:
        return Recipe.model_validate(document.values), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False, include_context=False))


def _key_of(loc: tuple[str | int, ...]) -> Key:
    """pydantic's location without the names it gives to the members of a union."""
    annotation: Any = Recipe
    key: Key = ()
    for part in loc:
        section = section_of(annotation)
        if isinstance(part, int):
            key = (*key, part)
            annotation = get_args(bare(annotation))[0] if is_list(annotation) else None
        elif section is not None and not is_list(annotation):
            key = (*key, part)
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
        elif bare(annotation) == dict[str, Any]:
            key = (*key, part)
    return key


def _value_at(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


def _take_text_as_written(document: Document, errors: list[Any]) -> bool:
    """Where text is wanted and the YAML was a bare `2024`, `1e5` or `true`, it is text as written."""
    changed = False
    for error in errors:
        key = _key_of(error["loc"])
        where = document.where.get(key)
        if error["type"] == "string_type" and where is not None and where.raw:
            _value_at(document.values, key[:-1])[key[-1]] = where.raw
            changed = True
    return changed


def _describe(error: Any, key: Key, document: Document) -> str:
    name, place = dotted(key), document.place(key)
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{name}: {message}{place}" if name else f"{message}{place}"
    if error["type"] == "extra_forbidden":
        meant = suggest(key)
        return f"{name}: unknown key{f'; did you mean {meant}?' if meant else ''}{place}"
    field = field_at(key)
    if error["type"] == "missing":
        said = field.description.rstrip(".") if field and field.description else ""
        return f"{name}: missing{said and f' ({said})'}{place}"
    value = _value_at(document.values, key)
    if field is None:  # an item of a list of plain values
        holder = field_at(key[:-1])
        takes = (
            wanted(get_args(bare(holder.annotation))[0])
            if holder and is_list(holder.annotation)
            else "something else"
        )
        choices: tuple[Any, ...] = ()
    else:
        takes = wanted(field.annotation, list(field.metadata))
        kind = bare(field.annotation)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
    close = get_close_matches(str(value), [str(choice) for choice in choices], 1)
    if choices and str(value) in ALIASES:
        close = [ALIASES[str(value)]]
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: must be {takes}, not {_shown(value)}{hint}{place}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = f"{value!r}"
    return text if len(text) <= 60 else text[:57] + "..."
