"""The arguments that many commands share, and how an answer is printed."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ropewalk.recipe import Recipe

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM, also where a checkpoint was saved in good order."""
REQUEUE = 75
"""Exit status after SIGUSR1 or SIGUSR2, which schedulers send before they take a machine away: the job is to
be started again (EX_TEMPFAIL of sysexits.h)."""

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]
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
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class Commands(typer.Typer):
    """Commands that also take --debug, which `main` looks at."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        register = super().command(name, **settings)

        def also_debug(command: Callable[..., None]) -> Callable[..., None]:
            @wraps(command)
            def run(debug: bool, **given: Any) -> None:
                command(**given)

            own = signature(command)
            debug = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
            run.__signature__ = own.replace(parameters=[*own.parameters.values(), debug])  # type: ignore[attr-defined]
            register(run)
            return command

        return also_debug


def checked(recipe: str, overrides: Sequence[str] | None) -> "Recipe":
    """The recipe in a file. Called before torch is loaded: a mistake in it is said at once."""
    from ropewalk.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


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
