"""`ropewalk data classifier`: learn from two sources what a good text is."""

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.data_tokenizer import sources_in
from ropewalk.cli.options import Json, Overwrite, print_json
from ropewalk.errors import UserError


def classifier(
    good: Annotated[
        str, typer.Argument(metavar="GOOD", help="Good texts: file, folder, glob.", show_default=False)
    ],
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="Source of what there is otherwise.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; a recipe takes it as data.clean.quality.")],
    seed: Annotated[int, typer.Option(help="Which texts are held out, and the order of the rest.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Learn a classifier of texts, for the attribute quality; prints how good it is on texts held out."""
    if good.endswith((".yaml", ".yml")) or other.endswith((".yaml", ".yml")):
        raise UserError("data classifier: give files, folders or globs of texts, not recipes")
    first, second = sources_in([good, other])

    from ropewalk.data.learn_classifier import learn_classifier
    from ropewalk.stage import Stage

    with Stage("classifier") as stage:
        found = learn_classifier(first, second, out, seed=seed, overwrite=overwrite, progress=stage.progress)
    if json:
        print_json(found.as_dict())
        return
    print(f"{found.directory}: from {found.texts[0]:,} good and {found.texts[1]:,} other texts")
    shown = {name: value for name, value in found.report.items() if name != "texts"}
    held_out = f"on {found.report['texts']:,.0f} of them held out" if "texts" in found.report else "held out"
    print(f"{held_out}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    for name, words in (("good", found.good), ("other", found.other)):
        print(f"most telling of {name}: " + ", ".join(f"{word} {p:.2f}" for word, p in words))
