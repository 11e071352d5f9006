"""`ropewalk prepare`."""

from typing import Annotated

import typer

from ropewalk.cli.options import Json, Overrides, Overwrite, RecipeFile, checked, print_json


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
) -> None:
    """Turn documents into tokenized shards, with a report."""
    found = checked(recipe, overrides)

    from ropewalk.data import prepare
    from ropewalk.stage import Stage

    with Stage(f"prepare {recipe}") as stage:
        prepared = prepare(found, overwrite=overwrite, on=on, progress=stage.progress)
        if profile:
            from ropewalk.look import profile as look_at

            account = look_at(
                prepared.directory,
                packing=found.data.packing,
                workers=found.data.workers,
                on=on,
                progress=stage.progress,
            )
    if json:
        print_json({name: getattr(prepared, name) for name in ("directory", "fingerprint", "report")})
    else:
        print(prepared.directory)
        for alert in account["alerts"] if profile else ():
            print(f"{alert['level']}: {alert['text']}")
