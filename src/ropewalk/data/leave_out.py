"""The cleaning of a recipe with one part of it left out: a rule, a set of rules, or what is done to texts."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ropewalk.data.catalog import plan_of
from ropewalk.errors import UserError

DONE: Mapping[str, Any] = {"pii": "keep", "against": (), "prefer": None}
"""Fields of data.clean that do something by themselves, and their value where nothing is done."""


def leave_out(clean: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of data.clean without `name`: a rule (data.clean.keep.NAME=null), one of data.clean.rules or
    of data.clean.duplicates, or a field of DONE.

    Raises UserError that lists what can be left out, where that is none of it.
    """
    for field in ("duplicates", "rules"):
        if name in clean[field]:
            return {**clean, field: tuple(value for value in clean[field] if value != name)}
    if name in DONE and clean[name] != DONE[name]:
        return {**clean, name: DONE[name]}
    rules = _rules(clean)
    if name not in rules:
        known = [*clean["rules"], *clean["duplicates"], *(n for n in DONE if clean[n] != DONE[n]), *rules]
        close = get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        there = f"there is {', '.join(known)}" if known else "data.clean of the recipe asks for nothing"
        raise UserError(f"--without {name}: there is nothing of that name to leave out{hint} ({there})")
    keep = {rule: expression for rule, expression in clean["keep"].items() if rule != name}
    if name in _rules({**clean, "keep": keep}):  # it is in a set of rules, which goes on to bring it
        keep[name] = None
    return {**clean, "keep": keep}


def nothing(clean: Mapping[str, Any]) -> dict[str, Any]:
    """The values of data.clean without all that leaves out or changes documents, but for `repair`."""
    empty: dict[str, Any] = {"rules": (), "keep": {}, "duplicates": ()}
    return {**clean, **empty, **DONE}


def _rules(clean: Mapping[str, Any]) -> list[str]:
    files: dict[str, Any] = {"against": (), "quality": None, "model": None}  # which no rule's name depends on
    return [rule.name for rule in plan_of({**clean, **files}).rules]
