"""`ropewalk train`."""

import os
from typing import TYPE_CHECKING

import typer

from ropewalk.cli.options import INTERRUPTED, REQUEUE, Debug, Json, Overrides, RecipeFile, print_json

if TYPE_CHECKING:
    from ropewalk.train import TrainResult


def command(
    recipe: RecipeFile, overrides: Overrides = None, json: Json = False, debug: Debug = False
) -> None:
    """Pretrain or fine-tune; prints the run directory."""
    from ropewalk.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())  # a mistake in it is said before torch is loaded

    from ropewalk.train import train

    finish(train(checked), json)


def finish(result: "TrainResult", json: bool) -> None:
    """Print what became of a run; an interrupted one ends with a status that stops a script."""
    if os.environ.get("RANK", "0") != "0":
        pass  # one of several processes, of which the first speaks
    elif json:
        print_json(result)
    else:
        print(result.run)
    if result.interrupted:
        raise typer.Exit(REQUEUE if result.preempted else INTERRUPTED)
