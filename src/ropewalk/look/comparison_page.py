"""What `compare` found as one page that needs nothing else."""

from collections.abc import Mapping
from typing import Any

from ropewalk.look.charts import histogram
from ropewalk.look.html import Markup, document, el, join, number, stylesheet, table
from ropewalk.look.page_parts import sample


def comparison_page(account: Mapping[str, Any]) -> str:
    a, b = account["a"], account["b"]
    return document(
        "Two versions of data",
        stylesheet(),
        el("h1", "Two versions of data"),
        el("p", "A: ", el("code", a["folder"]), class_="muted"),
        el("p", "B: ", el("code", b["folder"]), class_="muted"),
        el("p", headline(account), class_="lede"),
        table(("", "A", "B", "change"), _totals(account)),
        el("section", el("h2", "Sources"), _sources(account)),
        el("section", el("h2", "Rules"), _rules(account)) if account["rules"] else None,
        _only("Only in A", account["only_a"], "in B"),
        _only("Only in B", account["only_b"], "in A"),
        el("section", el("h2", "Lengths"), _lengths(account)),
    )


def headline(account: Mapping[str, Any]) -> str:
    """One sentence of what changed."""
    only = [account[name] for name in ("only_a", "only_b")]
    return (
        f"{number(account['common']['documents'])} documents are in both; {number(only[0]['documents'])} "
        f"({number(only[0]['tokens'])} tokens) only in A, {number(only[1]['documents'])} "
        f"({number(only[1]['tokens'])} tokens) only in B."
    )


def _totals(account: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    a, b = account["a"], account["b"]
    names = {
        "documents": "documents read",
        "kept": "documents kept",
        "tokens": "tokens",
        "scored": "scored tokens",
    }
    rows = [(said, a[name], b[name], change(a[name], b[name])) for name, said in names.items()]
    medians = [side["tokens_a_document"]["median"] or 0 for side in (a, b)]
    same = account["common"]["tokens"]
    rows.append(("tokens of the documents in both", *same, change(*same)))
    return [*rows, ("median tokens a document", *medians, change(*medians))]


def change(a: float, b: float) -> str:
    """+12 (+3.4%)."""
    if a == b:
        return "the same"
    share = f" ({(b - a) / a:+.1%})" if a else ""
    sign = "+" if b > a else "−"
    return f"{sign}{number(abs(b - a))}{share}".replace("-", "−")


def _sources(account: Mapping[str, Any]) -> Markup:
    a, b = account["a"]["sources"], account["b"]["sources"]
    none = {"kept": 0, "tokens": 0}
    rows = []
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name, none), b.get(name, none)
        kept = (left["kept"], right["kept"], change(left["kept"], right["kept"]))
        rows.append((name, *kept, left["tokens"], right["tokens"], change(left["tokens"], right["tokens"])))
    return table(("source", "kept in A", "kept in B", "change", "tokens in A", "tokens in B", "change"), rows)


def _rules(account: Mapping[str, Any]) -> Markup:
    rows = []
    for rule in account["rules"]:
        a, b = rule["a"], rule["b"]
        keeps = [el("code", side["keeps"]) if side else "no such rule" for side in (a, b)]
        same = a and b and a["keeps"] == b["keeps"]
        said = keeps[0] if same else [keeps[0], " → ", keeps[1]]
        rows.append((rule["rule"], *(side["dropped"] if side else "–" for side in (a, b)), said))
    return table(("rule", "dropped in A", "dropped in B", "keeps"), rows)


def _only(title: str, only: Mapping[str, Any], other: str) -> Markup:
    parts = []
    for group in only["why"]:
        sources = ", ".join(f"{name} {number(n)}" for name, n in group["sources"].items())
        head = el(
            "summary",
            el("b", group["why"]),
            el("span", number(group["documents"]), class_="number"),
            el("span", f"{number(group['tokens'])} tokens; {sources}", class_="counts"),
        )
        parts.append(el("details", head, [sample(entry) for entry in group["samples"]], class_="rule"))
    said = f"What became of them {other}:" if parts else "None."
    return el("section", el("h2", title), el("p", said), join(parts))


def _lengths(account: Mapping[str, Any]) -> Markup:
    lengths = account["lengths"]
    cards = [
        el(
            "div",
            el("h3", f"{name.upper()}: tokens a document"),
            histogram(
                name.upper(),
                lengths["edges"],
                lengths[name],
                behind=lengths["b" if name == "a" else "a"],
                log=True,
            ),
            class_="card",
        )
        for name in ("a", "b")
    ]
    said = el("p", "The outline is the other version.", class_="muted")
    return join([said, el("div", cards, class_="grid2")])
