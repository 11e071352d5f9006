"""The arguments that many commands share, and how an answer is printed."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM, also where a checkpoint was saved in good order."""
REQUEUE = 75
"""Exit status after SIGUSR1 or SIGUSR2, which schedulers send before they take a machine away: the job is to
be started again (EX_TEMPFAIL of sysexits.h)."""

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)]
ModelSource = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run directory, Hugging Face directory or hub id, .gguf file, or package://DISTRIBUTION/FILE.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Changes to the recipe, as in train.steps=100.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else repr(value)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns, numbers to four digits, nothing cut off."""
    table = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
