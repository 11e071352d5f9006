"""A recipe as text: YAML that reloads to an equal recipe, and the JSON Schema that editors check it with."""

from typing import Any

import yaml

from ropewalk.recipe.document import SCALARS
from ropewalk.recipe.schema import Recipe


class _Dumper(yaml.SafeDumper):
    """Quotes what a YAML 1.2 reader (such as ours) would take for a number, besides what YAML 1.1 does."""


for _resolver in SCALARS:
    _Dumper.add_implicit_resolver(*_resolver)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(recipe: Recipe) -> str:
    """Every field of a recipe as YAML; `load_recipe` of it gives an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, with each field's line of documentation."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Ropewalk recipe"}
