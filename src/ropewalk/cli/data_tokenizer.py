"""`ropewalk data tokenizer|fertility`: learn a tokenizer from texts, and measure tokenizers on texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropewalk.cli.options import Json, Overwrite, print_json, print_table

if TYPE_CHECKING:
    from ropewalk.data.readers import Source


def tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|SOURCE...",
            help="Files, folders, globs; of a recipe its data.train.",
            show_default=False,
        ),
    ],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all, special ones and bytes included.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a Hugging Face tokenizer.")],
    digits: Annotated[
        int, typer.Option(min=1, max=3, help="Digits of a number in one token: 3 as Llama 3, 1 as Qwen 2.")
    ] = 3,
    special: Annotated[
        list[str] | None, typer.Option(help="One more special token, as in --special '<|tool|>'.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="File with a Jinja chat template.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Learn a byte-level BPE tokenizer; a recipe takes it as model.tokenizer."""
    named = sources_in(sources)

    from ropewalk.data.train_tokenizer import train_tokenizer
    from ropewalk.stage import Stage

    with Stage(f"tokenizer of {vocab_size:,} tokens") as stage:
        found = train_tokenizer(
            named,
            vocab_size,
            out,
            digits=digits,
            special=special or (),
            chat_template=chat_template,
            overwrite=overwrite,
            progress=stage.progress,
        )
    if json:
        print_json({"directory": found.directory, "vocab_size": found.vocab_size, "note": found.note})
        return
    texts, size = (sum(getattr(source, what) for source in found.sources) for what in ("texts", "bytes"))
    print(f"{found.directory}: {found.vocab_size:,} tokens from {texts:,} texts, {size:,} bytes")
    if found.note:
        print(found.note)


def fertility(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...",
            help="Folders of tokenizers, or anything that model.tokenizer takes.",
            show_default=False,
        ),
    ],
    on: Annotated[
        list[str],
        typer.Option("--on", help="A source to measure on, or a recipe for its data.train; can be repeated."),
    ],
    json: Json = False,
) -> None:
    """Compare tokenizers: tokens per word, bytes per token, words split, vocabulary not used."""
    named = sources_in(on)

    from ropewalk.data.fertility import fertility, table_rows
    from ropewalk.model import load_tokenizer
    from ropewalk.stage import Stage

    loaded = {name: load_tokenizer(name) for name in tokenizers}
    with Stage("fertility") as stage:
        found = fertility(loaded, named, stage.progress)
    if json:
        print_json([one.as_dict() for one in found])
    else:
        print_table(*table_rows(found))


def sources_in(words: Sequence[str]) -> "list[Source]":
    """The sources that are named, and those of recipes' data.train."""
    from ropewalk.data.entry import name_sources
    from ropewalk.data.readers import Source
    from ropewalk.recipe import load_recipe

    known = set(Source.__dataclass_fields__)
    found: list[dict[str, Any]] = []
    for word in words:
        if word.endswith((".yaml", ".yml")):
            found += [source.model_dump(include=known) for source in load_recipe(word).data.train]
        else:
            found.append({"path": word})
    return name_sources(found)
