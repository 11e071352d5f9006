"""`ropewalk parity`."""

from dataclasses import asdict

import typer

from ropewalk.cli.options import Debug, Json, Overrides, RecipeFile, print_json


def command(
    recipe: RecipeFile, overrides: Overrides = None, json: Json = False, debug: Debug = False
) -> None:
    """Check that a layout (parallel.tensor=2, ...) trains what one process trains, on a shallow model."""
    from ropewalk.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())  # a mistake in it is said before torch is loaded

    from ropewalk.train import parity

    found = parity(checked)
    if json:
        print_json({**asdict(found), "same": found.same})
    else:
        print(found)
    if not found.same:
        raise typer.Exit(1)
