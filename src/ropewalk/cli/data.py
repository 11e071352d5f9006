"""`ropewalk data ...`: what is in the data, what rules drop, what changed, and what it was worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ropewalk.cli import data_ablate, data_classifier, data_tokenizer, data_trace
from ropewalk.cli.data_look import print_documents
from ropewalk.cli.options import Commands, Json, Overrides, RecipeFile, checked, print_json, print_table

if TYPE_CHECKING:
    from ropewalk.data.view import View

app = Commands(
    help="Look at data, learn tokenizers, and try what cleaning is worth.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _command in (
    data_tokenizer.tokenizer,
    data_tokenizer.fertility,
    data_classifier.classifier,
    data_ablate.ablate,
    data_trace.trace,
    data_trace.where,
):
    app.command()(_command)
RecipeOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|FOLDER", help="Recipe file, or a folder of prepared data.", show_default=False
    ),
]


@app.command("look")
def look(
    data: RecipeOrFolder,
    overrides: Overrides = None,
    search: Annotated[
        str | None, typer.Option(help="Text that is in the document, or /a regular expression/.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="SQL over what is known of a document, as in 'words < 50'.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="What this rule drops, and why.")] = None,
    without: Annotated[str | None, typer.Option(help="What this rule alone drops.")] = None,
    kept: Annotated[bool, typer.Option("--kept", help="Only what is kept.")] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="Only what is not.")] = False,
    id: Annotated[str | None, typer.Option("--id", help="The document of this name, whole.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many documents to show.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Which ones: another seed, others.")] = 0,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show the tokens, and which are scored; needs the recipe.")
    ] = False,
    json: Json = False,
) -> None:
    """Show documents with what is known of them, chosen by text, expression, rule or name."""
    from ropewalk.errors import UserError
    from ropewalk.look.documents import Question, tokens_of
    from ropewalk.look.documents import look as find

    if kept and dropped:
        raise UserError("--kept and --dropped: give one of them")
    view = _view(data, overrides, [where] if where else [])
    fate: Literal["kept", "dropped"] | None = "kept" if kept else "dropped" if dropped else None
    found = find(view, Question(search, where, rule, without, fate, id), sample, seed)
    if tokens:
        if _is_folder(data):
            raise UserError("--tokens: a folder has no tokenizer; give the recipe that it was prepared from")
        from ropewalk.data.entry import tokenization_of

        made = tokenization_of(data, overrides or ())
        for document in found["documents"]:
            document["tokens"] = list(tokens_of(view, document["part"], document["row"], *made))
    if json:
        print_json(found)
    else:
        print_documents(found, whole=id is not None)


@app.command("rules")
def rules(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Show what each rule of a recipe drops, without tokenizing: quick when a threshold moves."""
    from ropewalk.look.documents import judgement

    found = judgement(_view(recipe, overrides, []))
    if json:
        print_json(found)
        return
    print(f"{found['kept']:,} of {found['documents']:,} documents are kept")
    total = max(found["documents"], 1)
    rows = [
        (
            rule["rule"],
            f"{rule['dropped']:,}",
            f"{rule['dropped'] / total:.1%}",
            f"{rule['failed']:,}",
            f"{rule['failed_alone']:,}",
            rule["keeps"],
            rule["reason"],
        )
        for rule in found["rules"]
    ]
    if rows:
        print_table(("rule", "dropped", "share", "failed", "alone", "keeps", "reason"), rows)
        print()
    sources = [
        (name, f"{n['documents']:,}", f"{n['kept']:,}", f"{n['kept'] / max(n['documents'], 1):.1%}")
        for name, n in found["sources"].items()
    ]
    print_table(("source", "read", "kept", "share"), sources)


@app.command("compare")
def compare(
    first: RecipeOrFolder,
    second: RecipeOrFolder,
    out: Annotated[Path | None, typer.Option(help="Write it as a page to this .html file.")] = None,
    json: Json = False,
) -> None:
    """Compare two versions of prepared data: what only one of them trains on, and why."""
    from ropewalk.files import atomic_write
    from ropewalk.look.comparison import compare as between
    from ropewalk.look.comparison_page import comparison_page, headline

    found = between(_prepared(first), _prepared(second))
    if out is not None:
        atomic_write(out, comparison_page(found))
    if json:
        print_json(found)
        return
    print(headline(found))
    for name, other in (("a", "b"), ("b", "a")):
        for group in found[f"only_{name}"]["why"]:
            what = f"{group['documents']:,} documents, {group['tokens']:,} tokens"
            print(f"only in {name.upper()}: {what}; in {other.upper()}: {group['why']}")
    changed = [
        (rule["rule"], *(side and side["dropped"] for side in (rule["a"], rule["b"])))
        for rule in found["rules"]
    ]
    if changed:
        print()
        print_table(("rule", "dropped in A", "dropped in B"), changed)
    if out is not None:
        print(f"wrote {out}")


def _is_folder(data: str) -> bool:
    return Path(data).is_dir()


def _view(data: str, overrides: Any, also: list[str]) -> "View":
    if _is_folder(data):
        from ropewalk.data.view import View

        return View.open(Path(data))
    from ropewalk.data.entry import judge
    from ropewalk.stage import Stage

    with Stage(f"judge {data}") as stage:
        return judge(checked(data, overrides), also=also, progress=stage.progress)


def _prepared(data: str) -> "View":
    from ropewalk.data.view import View

    if _is_folder(data):
        return View.open(Path(data))
    from ropewalk.data.entry import prepared_folder

    return View.open(prepared_folder(data))
