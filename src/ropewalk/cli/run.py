"""`ropewalk run`."""

from typing import TYPE_CHECKING

import typer

from ropewalk.cli.options import INTERRUPTED, Json, Overrides, RecipeFile, checked, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from ropewalk.lane import LaneResult

PROMPT_LINES = 12


def command(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """The whole lane: prepare, measure, train, measure, report."""
    from rich.console import Console

    found = checked(recipe, overrides)

    from ropewalk.lane import run

    result = run(found)
    if json:
        print_json({**vars(result), "samples": [vars(sample) for sample in result.samples]})
    else:
        show(result, Console(highlight=False))
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def show(result: "LaneResult", console: "Console") -> None:
    """The samples, the table, and how to go on."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    for sample in result.samples:
        lines = sample.prompt.strip().splitlines()
        body = Text("\n".join(lines[:PROMPT_LINES] + ["..."] * (len(lines) > PROMPT_LINES)), style="dim")
        for who, text in sample.answers:
            body.append(f"\n{who:<9} ", style="bold not dim")
            body.append(text, style="not dim")
        console.print(Panel(body))
    if result.comparisons:
        table = Table("measure", "on", "base (its best prompt)", "tuned")
        for row in result.comparisons:
            old = "-" if row.base is None else f"{row.base:.2f}" + (f" ({row.prompt})" if row.prompt else "")
            style = {True: "bold green", False: "bold red", None: ""}[row.better]
            table.add_row(row.measure, row.on, old, Text(f"{row.tuned:.2f}", style=style))
        console.print(table)
    if result.interrupted:
        console.print(f"interrupted  ropewalk resume {result.run}", soft_wrap=True)
        console.print(f"and then     ropewalk eval {result.run}", soft_wrap=True)
    else:
        console.print(f"report       {result.run / 'report.md'}", soft_wrap=True)
        console.print(f"talk to it   ropewalk chat {result.run}", soft_wrap=True)
