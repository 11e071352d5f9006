"""profile.html: one page that needs nothing else, from the account alone. Its words are in templates/."""

import re
from collections.abc import Mapping
from typing import Any

from ropewalk.look.figures import number, percent, short
from ropewalk.look.html import render

FATES = 8
"""Rows that say what became of documents; the rules have a section of their own."""
VALUES = 8
"""Values of an attribute of text that are listed."""
SECTIONS = {
    "sources": "Sources",
    "lengths": "Lengths",
    "rules": "Rules",
    "attributes": "Attributes",
    "repeats": "Repeats",
    "duplicates": "Duplicates",
    "edits": "Edits",
    "samples": "Samples",
    "how": "How this was counted",
}


def page(account: Mapping[str, Any]) -> str:
    drawn = [attribute for attribute in account["attributes"] if attribute["histogram"]]
    rules = sorted(account["rules"], key=lambda rule: (-rule["dropped"], -rule["failed"]))
    optional = {"rules": rules, "attributes": drawn, "edits": account["edits"]}
    return render(
        "profile.html",
        title=f"Data profile: {account['folder']}",
        account=account,
        sections={name: title for name, title in SECTIONS.items() if optional.get(name, True)},
        tiles=_tiles(account),
        fate=_fate(account),
        values=[_values(values) for values in account["values"]],
        rules=rules,
        attributes=drawn,
        # The report writes what is scored between these brackets: every second part.
        texts=[
            (entry["id"], re.split(r"⟦(.*?)⟧", entry["text"], flags=re.DOTALL))
            for entry in account["samples"]
        ],
    )


def _tiles(account: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, packing = account["splits"]["train"], account["packing"]
    held_out = sum(part["documents"] for part in account["fate"] if part["what"] == "validation")
    tiles = [
        (number(account["documents"]), "documents read"),
        (percent(account["kept"], account["documents"]), "of them kept"),
        (short(train["tokens"]), "tokens for training"),
        (percent(train["scored"], train["tokens"]), "of them scored"),
        (number(held_out) if held_out else "none", "validation documents"),
    ]
    filled, rows = train["packing_efficiency"].get(packing), train["rows"].get(packing)
    if filled is not None and rows is not None:
        tiles.append((number(rows), f"rows of {number(account['sequence_length'])} tokens"))
        tiles.append((percent(1 - filled, 1), f"padding, packing={packing}"))
    return tiles


def _fate(account: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What became of how many documents; the rules that drop the least are one."""
    fate = [(part["what"], part["documents"]) for part in account["fate"] if part["documents"]]
    if len(fate) <= FATES:
        return fate
    rest = [n for what, n in fate[FATES:] if what.startswith("dropped")]
    others = [(what, n) for what, n in fate[FATES:] if not what.startswith("dropped")]
    return [*fate[:FATES], (f"dropped by {len(rest)} more rules", sum(rest)), *others]


def _values(values: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, int]], int]:
    """(attribute, what it is, its most frequent values with their documents, documents in all)."""
    kept = sorted(values["kept"].items(), key=lambda item: (-item[1], item[0]))
    top = kept[:VALUES]
    if len(kept) > VALUES:
        top.append((f"{len(kept) - VALUES} more", sum(n for _, n in kept[VALUES:])))
    return values["name"], values["what"], top, sum(values["kept"].values())
