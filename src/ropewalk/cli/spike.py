"""`ropewalk spike`."""

from typing import Annotated

import typer

from ropewalk.cli.options import Json, Run, print_json, print_table

TEXT = 60
"""Characters of a text in the table."""


def command(
    run: Run,
    step: Annotated[int, typer.Option("--step", help="Which step.", show_default=False)],
    json: Json = False,
) -> None:
    """List the documents of one step, the largest loss first; `!` marks outliers.

    Losses are computed with the newest checkpoint before that step.
    """
    from ropewalk.train import spike

    found = spike(run, step)
    if json:
        print_json(found)
        return
    missing = f", {found.updates_missing} updates before the step" if found.updates_missing else ""
    gone = ", left out by a rollback" if found.left_out else ""
    print(f"step {step} of {run}: batch {found.batch}{gone}; losses by {found.weights}{missing}")
    rows = [
        (
            "!" if document.outlier else "",
            "not finite" if document.loss is None and document.scored_tokens else document.loss,
            document.scored_tokens,
            document.id,
            " ".join(document.text.split())[:TEXT],
        )
        for document in found.documents
    ]
    print_table(("", "loss", "scored", "document", "text"), rows)
