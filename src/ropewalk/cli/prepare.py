"""`ropewalk prepare`."""

from typing import Annotated

import typer

from ropewalk.cli.options import Debug, Json, Overrides, Overwrite, RecipeFile, print_json


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    on: Annotated[
        str | None,
        typer.Option("--on", help="dask: a Dask cluster on this machine; dask:ADDRESS: a Dask scheduler."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write profile.html: what is in the data, on one page.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn documents into tokenized shards, with a report."""
    from ropewalk.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())  # a mistake in it is said before torch is loaded

    from ropewalk.data import prepare
    from ropewalk.stage import Stage

    with Stage(f"prepare {recipe}") as stage:
        prepared = prepare(checked, overwrite=overwrite, on=on, progress=stage.progress)
        if profile:
            from ropewalk.look import profile as look_at

            account = look_at(
                prepared.directory,
                packing=checked.data.packing,
                workers=checked.data.workers,
                on=on,
                progress=stage.progress,
            )
    if json:
        print_json(
            {
                "directory": prepared.directory,
                "fingerprint": prepared.fingerprint,
                "report": prepared.report,
            }
        )
    else:
        print(prepared.directory)
        for alert in account["alerts"] if profile else ():
            print(f"{alert['level']}: {alert['text']}")
