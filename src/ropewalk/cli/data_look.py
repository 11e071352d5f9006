"""Documents in the terminal: marked, and token by token."""

from collections.abc import Mapping, Sequence
from typing import Any

CHARACTERS, TOKENS = 1500, 600
"""So much is shown of a document, unless it is shown whole."""


def print_documents(found: Mapping[str, Any], whole: bool) -> None:
    """What `look` found. Colours only in a terminal; what is marked is between » and « elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for document in found["documents"]:
        console.print(_head(document), markup=False)
        if "tokens" in document:
            console.print(_tokens(document["tokens"], whole, console.is_terminal))
        else:
            console.print(_text(document, whole, console.is_terminal))
        console.print()
    shown = len(found["documents"])
    console.print(f"{shown:,} of {found['matching']:,} that match, of {found['of']:,}", style="dim")


def _head(document: Mapping[str, Any]) -> Any:
    from rich.text import Text

    from ropewalk.look.samples import visible

    head = Text(visible(document["id"]), style="bold")
    if document["verdict"] is not None:
        said = f"  dropped by {document['verdict']}: {document['reason']} (keeps {document['keeps']})"
        head.append(said, style="not bold red")
        others = [name for name in document["failed"] or () if name != document["verdict"]]
        if others:
            head.append(f" (fails also {', '.join(others)})", style="not bold red")
    elif not document["kept"]:
        head.append("  left out: empty, too long or without scored tokens", style="not bold red")
    values = [f"{name} = {_value(value)}" for name, value in document["values"].items()]
    if values:
        head.append(visible("\n" + ", ".join(values)), style="not bold cyan")
    return head


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} places" if value and isinstance(value[0], dict) else f"{len(value)} values"
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(document: Mapping[str, Any], whole: bool, colour: bool) -> Any:
    from rich.text import Text

    from ropewalk.look.samples import shown, visible

    text = document["text"]
    part = shown(text, map(tuple, document["marks"]), len(text) if whole else CHARACTERS)
    result, at = Text(), 0
    if part["before"]:
        result.append(f"[… {part['before']:,} characters …]\n", style="dim")
    for start, end in part["marks"]:
        result.append(visible(part["text"][at:start]))
        found = visible(part["text"][start:end])
        result.append(found if colour else f"»{found}«", style="black on yellow")
        at = end
    result.append(visible(part["text"][at:]))
    if part["after"]:
        result.append(f"\n[… {part['after']:,} characters …]", style="dim")
    return result


def _tokens(tokens: Sequence[tuple[str, bool, bool]], whole: bool, colour: bool) -> Any:
    """Neighbours differ in their ground, what is not scored is dim, special tokens stand out; without colours
    tokens are divided by | and those not scored stand in brackets."""
    from rich.text import Text

    from ropewalk.look.samples import visible

    shown = tokens if whole else tokens[:TOKENS]
    result = Text()
    for i, (text, scored, special) in enumerate(shown):
        said = visible(text).replace("\n", "⏎\n").replace("\t", "→\t")
        if not colour:
            result.append(("" if i == 0 else "|") + (said if scored else f"[{said}]"))
            continue
        ground = "on grey23" if i % 2 else "on grey15"
        ink = "bold magenta" if special else "bright_green" if scored else "grey58"
        result.append(said, style=f"{ink} {ground}")
    count = sum(token[1] for token in tokens)
    result.append(f"\n{len(tokens):,} tokens, {count:,} scored", style="dim")
    if len(shown) < len(tokens):
        result.append(f"; the first {len(shown):,} are shown", style="dim")
    return result
