"""The typed recipe. In: a YAML file, a dictionary, `a.b=c` overrides. Out: a frozen, checked `Recipe`.

May import: nothing of Ropewalk but its errors. Imported by entry functions of the stage rooms only.
"""

from ropewalk.recipe.derive import Resolved, resolve
from ropewalk.recipe.document import Origin
from ropewalk.recipe.loader import load_recipe, load_with_origins
from ropewalk.recipe.machine import Machine
from ropewalk.recipe.schema import Planned, Recipe
from ropewalk.recipe.write import json_schema, to_yaml

__all__ = [
    "Machine",
    "Origin",
    "Planned",
    "Recipe",
    "Resolved",
    "json_schema",
    "load_recipe",
    "load_with_origins",
    "resolve",
    "to_yaml",
]
