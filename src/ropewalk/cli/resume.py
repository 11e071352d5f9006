"""`ropewalk resume`."""

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.options import Debug, Json
from ropewalk.cli.train import finish


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with an interrupted run.

    The result is bit for bit that of a run that never stopped.
    """
    from ropewalk.train import resume

    finish(resume(run), json)
