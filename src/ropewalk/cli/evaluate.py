"""`ropewalk eval`."""

from typing import Annotated

import typer

from ropewalk.cli.options import Json, ModelSource, Overrides, Overwrite, checked, print_json


def command(
    model: ModelSource,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose evaluate section says what to measure; by default the run's."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the tasks of evaluate.base.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the result.")] = None,
    contamination: Annotated[
        str | None,
        typer.Option(
            help="Account of which rows are in the training data; by default that of the run's prepared data."
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Measure a model: perplexity, tasks, the prompt panel.

    MODEL may also be a recipe file: then its own starting model is measured.
    """
    from pathlib import Path

    source: str | None = model
    if recipe is None and model.endswith((".yaml", ".yml")):
        source, recipe = None, model
    if recipe is None and (Path(model) / "recipe.yaml").is_file():
        recipe = str(Path(model) / "recipe.yaml")
    wanted = None if recipe is None else checked(recipe, overrides)

    from ropewalk.evaluate import evaluate, panel_markdown
    from ropewalk.stage import Stage

    with Stage(f"evaluate {model}") as stage:
        result = evaluate(
            source,
            wanted,
            name=name,
            base=base,
            contamination=contamination,
            overwrite=overwrite,
            progress=stage.progress,
        )
    if json:
        print_json(result.as_dict())
    else:
        print(result.table() or panel_markdown(result.panel), end="")
