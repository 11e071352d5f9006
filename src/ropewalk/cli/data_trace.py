"""`ropewalk data trace|where`: from a step to its documents and their files, and back."""

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.options import Json, print_json, print_table

RunOrData = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|FOLDER", help="Run directory, or a folder of prepared data.", show_default=False
    ),
]


def trace(
    run: RunOrData,
    step: Annotated[int | None, typer.Option("--step", help="Which step.", show_default=False)] = None,
    sql: Annotated[
        str | None,
        typer.Option(help="Another query, over the tables steps, pieces and documents.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """List the documents in a step of a run: where each is from, and which of its tokens are in which row."""
    from ropewalk.errors import UserError
    from ropewalk.train.provenance import Provenance

    if (step is None) == (sql is None):
        raise UserError("give one of --step and --sql")
    provenance = Provenance.open(run)
    found = provenance.trace(step) if step is not None else provenance.sql(sql or "")
    rows = found.to_pylist()
    if json:
        print_json(rows)
    else:
        print_table(found.column_names, [row.values() for row in rows])


def where(
    run: RunOrData,
    id: Annotated[
        str, typer.Argument(metavar="DOC_ID", help="As in reports: source:line.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Say where a document is from, what became of it, and which steps of the run see it."""
    from ropewalk.train.provenance import Provenance

    found = Provenance.open(run).where(id)
    if json:
        print_json(found)
        return
    print_table(("document", id), [(name, _said(value)) for name, value in found.items() if name != "id"])


def _said(value: object) -> object:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:20])) or None
        return f"{shown}, ... ({len(value):,} in all)" if len(value) > 20 else shown
    return value
