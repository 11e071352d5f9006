"""YAML file, dictionary or Recipe, with overrides, to a checked Recipe; every mistake in one message."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ropewalk.errors import UserError
from ropewalk.recipe.document import Document, Key, Origin, apply_overrides, dotted, from_mapping, read_file
from ropewalk.recipe.fields import ALIASES, choices, field_at, suggest, wanted
from ropewalk.recipe.schema import Recipe

EXCLUSIVE = (
    ("train.steps", "train.epochs", "train.tokens"),
    ("train.batch_size", "train.batch_tokens"),
    ("model.source", "model.config"),
)
"""Of each group a recipe has one; an override of one takes the place of the others."""


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
    return _validate(document), {dotted(key): origin for key, origin in document.where.items()}


def _validate(document: Document) -> Recipe:
    problems = document.problems
    recipe, errors = _try(document)
    if errors and _take_text_as_written(document, errors):
        recipe, errors = _try(document)
    keys = [_key_of(error, document.values) for error in errors]
    misspelled = {
        suggest(key) for key, error in zip(keys, errors, strict=True) if error["type"] == "extra_forbidden"
    }
    told: set[Key] = set()
    for key, error in zip(keys, errors, strict=True):
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


def _key_of(error: Any, values: Any) -> Key:
    """pydantic's location of an error in `values`, without the names it gives to the members of a union."""
    parts, key = error["loc"], Key()
    missing = parts[-1:] if error["type"] == "missing" else ()
    for part in parts[: len(parts) - len(missing)]:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int)
        ):
            key, values = (*key, part), values[part]
    return (*key, *missing)


def _value_at(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


def _take_text_as_written(document: Document, errors: list[Any]) -> bool:
    """Where text is wanted and the YAML was a bare `2024`, `1e5` or `true`, it is text as written."""
    changed = False
    for error in errors:
        key = _key_of(error, document.values)
        if error["type"] == "string_type" and (text := document.raw.get(key)):
            _value_at(document.values, key[:-1])[key[-1]] = text
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
        said = field.get("description", "").rstrip(".")
        return f"{name}: missing{said and f' ({said})'}{place}"
    value, options = _value_at(document.values, key), choices(field)
    close = get_close_matches(str(value), options, 1)
    if options and str(value) in ALIASES:
        close = [ALIASES[str(value)]]
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: must be {wanted(field)}, not {_shown(value)}{hint}{place}"


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
