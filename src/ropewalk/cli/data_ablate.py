"""`ropewalk data ablate`: what a cleaning rule is worth, by training with it and without it."""

from typing import TYPE_CHECKING, Annotated

import typer

from ropewalk.cli.options import (
    INTERRUPTED,
    Debug,
    Json,
    Overrides,
    RecipeFile,
    print_json,
    print_table,
)

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
    debug: Debug = False,
) -> None:
    """Train with a cleaning rule and without it, on as many tokens, and say what the difference is.

    Both are measured on data.validation or, where there is none, on the same documents that are split off.
    A run that is already there is not trained again.
    """
    from ropewalk.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())  # a mistake in it is said before torch is loaded

    import ropewalk

    found = ropewalk.ablate(
        checked, without=without, seeds=seeds, evaluate=evaluate, model_config=model_config
    )
    if json:
        print_json({**found.as_dict(), "interrupted": found.interrupted, "report": found.report})
    else:
        show(found)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def show(found: "Ablation") -> None:
    """The table, the verdicts, and where the report is."""
    from ropewalk.evaluate.ablation import sides_of
    from ropewalk.evaluate.paired import mean

    if found.interrupted:
        print(f"interrupted in {found.interrupted}; the same command goes on from there")
        return
    if found.measures:
        rows = [[one.measure, mean(one.before), mean(one.after), one.numbers()] for one in found.measures]
        print_table(["measure", *sides_of(found.without), "difference"], rows)
    for sentence in (*found.verdicts, *(f"note: {note}" for note in found.notes)):
        print(sentence)
    print(f"report: {found.report}")
