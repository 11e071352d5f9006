"""`ropewalk parity`."""

from dataclasses import asdict

import typer

from ropewalk.cli.options import Json, Overrides, RecipeFile, checked, print_json


def command(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Check that a layout (parallel.tensor=2, ...) trains what one process trains, on a shallow model."""
    layout = checked(recipe, overrides)

    from ropewalk.train import parity

    found = parity(layout)
    if json:
        print_json({**asdict(found), "same": found.same})
    else:
        print(found)
    if not found.same:
        raise typer.Exit(1)
