"""`ropewalk resume`."""

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.options import Debug, Json, Overrides
from ropewalk.cli.train import finish


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    overrides: Overrides = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with an interrupted run.

    The result is bit for bit that of a run that never stopped; parallel.shard=4 and the like spread it anew.
    """
    from ropewalk.train import resume

    finish(resume(run, overrides or ()), json)
