"""profile.html: one page that needs nothing else, from the account alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.look.charts import histogram
from ropewalk.look.html import (
    Markup,
    bar,
    document,
    el,
    join,
    number,
    percent,
    short,
    stylesheet,
    table,
)
from ropewalk.look.page_parts import attributes, edits, rules, sample

FATES = 8
"""Rows that say what became of documents; the rules have a section of their own."""
SIGNS = {"problem": "▲ Problem", "warning": "◆ Warning", "note": "● Note"}


def page(account: Mapping[str, Any]) -> str:
    sections = {
        "sources": ("Sources", _sources(account)),
        "lengths": ("Lengths", _lengths(account)),
        "rules": ("Rules", rules(account)),
        "attributes": ("Attributes", attributes(account)),
        "repeats": ("Repeats", _repeats(account)),
        "duplicates": ("Duplicates", _duplicates(account)),
        "edits": ("Edits", edits(account)),
        "samples": ("Samples", _samples(account)),
        "how": ("How this was counted", _how(account)),
    }
    there = {name: section for name, section in sections.items() if section[1]}
    links = [[el("a", title, href=f"#{name}"), " "] for name, (title, _) in there.items()]
    return document(
        f"Data profile: {account['folder']}",
        stylesheet(),
        el("header", _headline(account)),
        el("nav", links, aria_label="Sections"),
        _alerts(account["alerts"]),
        *(
            el("section", el("h2", title), content, id=name, aria_label=title)
            for name, (title, content) in there.items()
        ),
    )


def _headline(account: Mapping[str, Any]) -> Markup:
    train = account["splits"]["train"]
    held_out = sum(part["documents"] for part in account["fate"] if part["what"] == "validation")
    count = len(account["sources"])
    plural = "" if count == 1 else "s"
    lede = (
        f"{number(account['documents'])} documents were read from {count} source{plural}; "
        f"{number(account['kept'])} are kept. Training has {number(train['tokens'])} tokens, "
        f"{percent(train['scored'], train['tokens'])} of them scored."
    )
    filled = train["packing_efficiency"].get(account["packing"])
    packed = train["rows"].get(account["packing"])
    tiles: list[tuple[str, str]] = [
        (number(account["documents"]), "documents read"),
        (percent(account["kept"], account["documents"]), "of them kept"),
        (short(train["tokens"]), "tokens for training"),
        (percent(train["scored"], train["tokens"]), "of them scored"),
        (number(held_out) if held_out else "none", "validation documents"),
    ]
    if filled is not None and packed is not None:
        tiles.append((number(packed), f"rows of {number(account['sequence_length'])} tokens"))
        tiles.append((percent(1 - filled, 1), f"padding, packing={account['packing']}"))
    return join(
        [
            el("h1", "Data profile"),
            el("p", el("code", account["folder"]), class_="muted"),
            el("p", lede, class_="lede"),
            el(
                "div", [el("div", el("b", value), el("span", what), class_="tile") for value, what in tiles],
                class_="tiles",
            ),
        ]
    )  # fmt: skip


def _alerts(found: Sequence[Mapping[str, str]]) -> Markup:
    if not found:
        return el("p", "Nothing stands out.")
    items = [
        el("li", el("b", SIGNS[alert["level"]]), el("span", alert["text"]), class_=alert["level"])
        for alert in found
    ]
    first, rest = items[:12], items[12:]
    more = (
        el("details", el("summary", f"{len(rest)} more"), el("ul", rest, class_="alerts")) if rest else None
    )
    return el("section", el("ul", first, class_="alerts"), more, id="alerts", aria_label="What stands out")


def _sources(account: Mapping[str, Any]) -> Markup:
    total = sum(source["tokens"] for source in account["sources"])
    rows = [
        (
            [source["name"], " ", el("small", "validation")] if source["held_out"] else source["name"],
            source["documents"],
            bar(source["kept"], source["documents"]),
            source["tokens"],
            bar(source["tokens"], total),
            bar(source["scored"], source["tokens"]),
            source["tokens_a_document"]["median"] or 0,
            percent(source["again"], source["kept"]),
        )
        for source in account["sources"]
    ]
    header = (
        "source", "read", "kept", "tokens", "share of all tokens", "scored", "median tokens", "duplicates",
    )  # fmt: skip
    said = "Duplicates: share of the documents kept for training that equal an earlier one."
    fate = [(part["what"], part["documents"]) for part in account["fate"] if part["documents"]]
    if len(fate) > FATES:
        rest = [n for what, n in fate[FATES:] if what.startswith("dropped")]
        others = [(what, n) for what, n in fate[FATES:] if not what.startswith("dropped")]
        fate = [*fate[:FATES], (f"dropped by {len(rest)} more rules", sum(rest)), *others]
    shares = [(what, n, bar(n, account["documents"], _kind(what))) for what, n in fate]
    languages = [_values(values) for values in account["values"]]
    return join(
        [
            table(header, rows, said),
            el("h3", "What became of the documents"),
            table(("", "documents", "share of all that were read"), shares),
            el("div", languages, class_="cards") if languages else None,
        ]
    )


def _kind(what: str) -> str:
    return "main" if what in ("training", "validation") else "drop"


def _values(values: Mapping[str, Any]) -> Markup:
    kept = sorted(values["kept"].items(), key=lambda item: (-item[1], item[0]))
    total = sum(values["kept"].values())
    rows = [(name, n, bar(n, total)) for name, n in kept[:8]]
    if len(kept) > 8:
        rest = sum(n for _, n in kept[8:])
        rows.append((f"{len(kept) - 8} more", rest, bar(rest, total)))
    title = el("h3", values["name"])
    return el(
        "div", title, el("p", values["what"], class_="muted"), table(("", "kept", ""), rows), class_="card"
    )


def _lengths(account: Mapping[str, Any]) -> Markup:
    limit = account["sequence_length"]
    charts = []
    for name in ("train", "validation"):
        found = account["lengths"].get(name)
        if found:
            charts.append(
                _length(f"{name.capitalize()}: tokens a document", found, found["histogram"], limit)
            )
    if len(account["sources"]) > 1:
        charts += [
            _length(source["name"], source["tokens_a_document"], source["histogram"], limit)
            for source in account["sources"]
            if source["histogram"]["counts"]
        ]
    longer = account["lengths"]["longer_than_a_row"]
    said = (
        f"The dashed line is the length of a row, {number(limit)} tokens; {number(longer)} are longer. "
        f"Documents have a median of {number(account['words']['median'])} words and "
        f"{number(account['characters']['median'])} characters."
    )
    return join([el("p", said), el("div", charts, class_="cards")])


def _length(title: str, found: Mapping[str, Any], counts: Mapping[str, Any], limit: int) -> Markup:
    edges = [*counts["edges"]]
    inside = edges[0] <= limit <= edges[-1]
    drawn = histogram(title, edges, counts["counts"], log=True, limits=[("row", limit)] if inside else [])
    said = f"median {number(found['median'])}, 5% to 95%: {number(found['p5'])} to {number(found['p95'])}"
    return el("div", el("h3", title), drawn, el("p", said, class_="muted"), class_="card")


def _repeats(account: Mapping[str, Any]) -> Markup:
    lines, ngrams = account["lines"], account["ngrams"]
    parts = []
    for title, found, of in (
        ("Most repeated lines", lines, "lines"),
        (f"Most repeated runs of {ngrams['n']} words", ngrams, "runs"),
    ):
        top = [(el("code", entry["text"]), entry["count"], percent(entry["count"], found["total"]))
               for entry in found["top"] if entry["count"] > 1]  # fmt: skip
        said = f"Of {number(found['total'])} {of} in what is kept."
        if found["error"]:
            said += f" A count may be too low by up to {number(found['error'])}."
        rows = table(("", "times", "share"), top, said) if top else el("p", "None is there twice.")
        parts.append(el("div", el("h3", title), rows, class_="card"))
    return el("div", parts, class_="grid2")


def _duplicates(account: Mapping[str, Any]) -> Markup:
    found = account["duplicates"]
    said = f"{number(found['again'])} of the documents kept for training equal an earlier one, word for word."
    clusters = []
    for cluster in found["clusters"]:
        how = "the same" if cluster["exact"] else "the same or nearly"
        title = f"{number(cluster['documents'])} documents are {how}; {number(cluster['kept'])} kept"
        shown = cluster["samples"][:1] if cluster["exact"] else cluster["samples"]
        clusters.append(el("details", el("summary", title), [sample(s) for s in shown], class_="card"))
    return join([el("p", said), el("h3", "Biggest groups") if clusters else None, clusters])


def _samples(account: Mapping[str, Any]) -> Markup:
    """As the model sees them, chosen by hash: as good as random, and always the same."""
    shown = []
    for entry in account["samples"]:
        # The report writes what is scored between these brackets.
        parts = re.split(r"⟦(.*?)⟧", entry["text"], flags=re.DOTALL)
        marked = [
            part if i % 2 else el("span", part, class_="unscored") for i, part in enumerate(parts) if part
        ]
        shown.append(
            el("figure", el("figcaption", entry["id"]), el("pre", marked, dir="auto"), class_="sample")
        )
    said = "Training documents as the model sees them. What is not scored is grey."
    wrong = account["wrong"]["samples"]
    more = [el("h3", "With mojibake"), [sample(entry) for entry in wrong]] if wrong else None
    return join([el("p", said), shown, more])


def _how(account: Mapping[str, Any]) -> Markup:
    said = (
        "Lengths, repeats and samples are of what is kept, after edits; rules and attributes are of what was "
        "read. Quantiles and histograms are exact for up to 512 different values and within 1% beyond. A "
        "dashed line in a histogram is a limit of a rule; ‹ and › mean that the outermost bar has what lies "
        "beyond it. "
        "profile.json has every number of this page."
    )
    return el("p", said, class_="muted")
