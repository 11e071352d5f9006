"""`ropewalk train` and `ropewalk resume`."""

import os
from typing import TYPE_CHECKING

import typer

from ropewalk.cli.options import INTERRUPTED, REQUEUE, Json, Overrides, RecipeFile, Run, checked, print_json

if TYPE_CHECKING:
    from ropewalk.train import TrainResult


def train(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Pretrain or fine-tune; prints the run directory."""
    found = checked(recipe, overrides)

    from ropewalk.train import train

    _finish(train(found), json)


def resume(run: Run, overrides: Overrides = None, json: Json = False) -> None:
    """Go on with an interrupted run.

    The result is bit for bit that of a run that never stopped; parallel.shard=4 and the like spread it anew.
    """
    from ropewalk.train import resume

    _finish(resume(run, overrides or ()), json)


def _finish(result: "TrainResult", json: bool) -> None:
    """Print what became of a run; an interrupted one ends with a status that stops a script."""
    if os.environ.get("RANK", "0") != "0":
        pass  # one of several processes, of which the first speaks
    elif json:
        print_json(result)
    else:
        print(result.run)
    if result.interrupted:
        raise typer.Exit(REQUEUE if result.preempted else INTERRUPTED)
