"""`ropewalk data ablate`: what a cleaning rule is worth, by training with it and without it."""

from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from ropewalk.cli.options import INTERRUPTED, Json, Overrides, RecipeFile, checked, print_json, print_table

if TYPE_CHECKING:
    from ropewalk.evaluate.ablation import Ablation


def ablate(
    recipe: RecipeFile,
    without: Annotated[
        str,
        typer.Option(
            help="What to leave out of data.clean: a rule, one of rules or of duplicates, pii, against."
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=2, help="Pairs of runs, each with a seed of its own.")] = 3,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Also measure what the recipe's evaluate section says.")
    ] = False,
    model_config: Annotated[
        str | None,
        typer.Option(help="Shape of a model from scratch instead of the recipe's: small, or a file."),
    ] = None,
    json: Json = False,
) -> None:
    """Train with a cleaning rule and without it, on as many tokens, and say what the difference is.

    Both are measured on data.validation or, where there is none, on the same documents that are split off.
    A run that is already there is not trained again.
    """
    given = checked(recipe, overrides)

    import ropewalk

    found = ropewalk.ablate(given, without=without, seeds=seeds, evaluate=evaluate, model_config=model_config)
    if json:
        print_json({**found.as_dict(), "interrupted": found.interrupted, "report": found.report})
    else:
        show(found)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def show(found: "Ablation") -> None:
    """The table, the verdicts, and where the report is."""
    from ropewalk.evaluate.ablation import sides_of

    if found.interrupted:
        print(f"interrupted in {found.interrupted}; the same command goes on from there")
        return
    if found.measures:
        rows = [[one.measure, fmean(one.before), fmean(one.after), one.numbers()] for one in found.measures]
        print_table(["measure", *sides_of(found.without), "difference"], rows)
    for sentence in (*found.verdicts, *(f"note: {note}" for note in found.notes)):
        print(sentence)
    print(f"report: {found.report}")
