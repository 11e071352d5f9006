"""`ropewalk launch`."""

import sys
from typing import Annotated, Literal

import typer

from ropewalk.cli.options import Json, Overrides, RecipeFile, print_json


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[Literal["local", "slurm", "kubernetes"], typer.Option("--on", help="Where.")] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    processes_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes on each, one a GPU; unless told, as many as the recipe asks for."
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores of each process; unless told, 4, or its share of this machine."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="A further option of sbatch, as in --sbatch=--partition=gpu; can be repeated."),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image with Ropewalk (kubernetes).")] = None,
    volume: Annotated[
        str | None, typer.Option(help="Persistent volume claim with data and runs (kubernetes).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and do nothing.")] = False,
    json: Json = False,
) -> None:
    """Train on several processes or machines under torchrun: here, by SLURM, by Kubernetes.

    With a run directory in place of the recipe: go on with that run.
    """
    from ropewalk.launch import launch

    result = launch(
        recipe, overrides or (), on, nodes, processes_per_node, cores, sbatch or (), image, volume, dry_run
    )
    if json:
        print_json(result)
    elif dry_run:
        print(result.script, end="")
    elif result.answer:
        print(result.answer)
    if result.status:
        print(f"the processes' output is in {result.logs}", file=sys.stderr)
        raise typer.Exit(result.status)
