"""HTML from values: every text is escaped unless it was made here, so that a document is just text."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ropewalk.look.samples import visible


class Markup(str):
    """HTML; any other string is text."""


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
Child = Any
"""Markup, text, a number, None (nothing), or an iterable of such."""


def text(value: object) -> Markup:
    return Markup(escape(visible(str(value)), quote=True))


def el(tag: str, *children: Child, **attributes: object) -> Markup:
    """An element. `class_` is class, `_` in other names is `-`; an attribute that is None is left out."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{said}>{join(children)}</{tag}>")


def join(children: Child) -> Markup:
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, Iterable) and not isinstance(children, str):
        return Markup("".join(join(child) for child in children))
    return text(children)


def stylesheet() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def document(title: str, style: str, *body: Child) -> str:
    """A page that needs nothing else, and that no browser lets fetch or run anything."""
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{el("main", *body)}</body></html>\n'


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str | None = None) -> Markup:
    """Numbers (int, float) are set to the right; None stays empty. It scrolls where it is wide."""
    listed = [list(row) for row in rows]
    heads = [
        el("th", name, scope="col", class_="number" if i and all(map(_is_number, column)) else None)
        for i, (name, *column) in enumerate(zip(header, *listed, strict=True))
    ]
    body = el("tbody", *(el("tr", *(_cell(i, cell) for i, cell in enumerate(row))) for row in listed))
    head = el("thead", el("tr", *heads))
    scrolled = el(
        "div",
        el("table", head, body),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )
    return join([el("p", caption, class_="muted") if caption else None, scrolled])


def _cell(i: int, cell: Child) -> Markup:
    if i == 0:
        return el("th", cell, scope="row")
    if _is_number(cell):
        return el("td", number(cell), class_="number")
    return el("td", cell)


def _is_number(cell: Child) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def number(value: float | None) -> str:
    """To be read: 12,345; 0.0312; 1.5e-07."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def short(value: float) -> str:
    """For axes: 1.5k, 20M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def percent(part: float, whole: float) -> str:
    """Never 0% of something, never 100% of what is not all."""
    if not whole:
        return "–"
    share = part / whole
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def bar(part: float, whole: float, kind: str = "main") -> Markup:
    """A share as a bar with its percentage beside it."""
    width = 100 * part / whole if whole else 0
    inside = el("span", class_=f"fill {kind}", style=f"width:{width:.2f}%")
    return el(
        "span",
        el("span", inside, class_="bar", aria_hidden="true"),
        el("span", percent(part, whole), class_="share"),
        class_="barred",
    )
