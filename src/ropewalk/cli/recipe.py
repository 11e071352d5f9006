"""`ropewalk recipe show|schema`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.options import Commands, Json, Overrides, RecipeFile, print_json

app = Commands(help="Look at a recipe, or write its schema for editors.")


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Print every value of a recipe, where it comes from, and why a derived one is what it is."""
    from ropewalk.recipe import load_with_origins, resolve

    resolved = resolve(*load_with_origins(recipe, overrides or ()))
    if json:
        origins = {name: vars(origin) for name, origin in resolved.origins.items()}
        print_json({"recipe": resolved.recipe.model_dump(mode="json"), "origins": origins})
        return
    for line in lines(resolved):
        print(line)


def lines(resolved: "Resolved") -> list[str]:  # type: ignore[name-defined]  # noqa: F821  (imported lazily)
    """The tree as aligned text: key and value at the left, origin at the right."""
    from ropewalk.recipe.derive import leaves

    rows: list[tuple[str, str]] = []
    shown: tuple[str, ...] = ()
    for name, value in leaves(resolved.recipe):
        *above, last = name.split(".")
        for depth, section in enumerate(above):
            if shown[: depth + 1] != tuple(above[: depth + 1]):
                rows.append(("  " * depth + f"{section}:", ""))
                shown = tuple(above[: depth + 1])
        shown = tuple(above)
        origin = resolved.origins[name]
        said = origin.where if origin.kind in ("file", "override") else origin.kind
        rows.append(
            ("  " * len(above) + f"{last}: {_text(value)}", said + (f": {origin.why}" if origin.why else ""))
        )
    width = min(48, max(len(left) for left, _ in rows))
    return [f"{left:<{width}}  # {right}" if right else left for left, right in rows]


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\n", "\\n") or '""'


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; by default it is printed.")] = None,
) -> None:
    """Write the JSON Schema of a recipe file."""
    from ropewalk.files import atomic_write
    from ropewalk.recipe import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        atomic_write(out, text)
        print(f"wrote {out}")
