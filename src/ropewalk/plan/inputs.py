"""Checks of what a user asked the planner, each one plain message."""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

from ropewalk.errors import UserError

T = TypeVar("T")


def positive(**values: float) -> None:
    """UserError for the first of `values` that is not a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value:g}; it must be above 0")


def whole(**values: float) -> None:
    """UserError for the first of `values` that is not a whole number above 0."""
    positive(**values)
    for name, value in values.items():
        if value != int(value):
            raise UserError(f"{name} is {value:g}; it must be a whole number")


def counted(value: Any, what: str) -> int:
    """A whole number above 0, as one that was read. UserError, naming `what`, for anything else."""
    found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    if not found >= 1 or found % 1 or math.isinf(found):
        raise UserError(f"{what}: must be a whole number above 0, not {value!r}")
    return int(found)


def at_least(least: float, **values: float) -> None:
    """UserError for the first of `values` that is not a finite number from `least` on."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= least):
            raise UserError(f"{name} is {value:g}; it must be {least:g} or more")


def share(**values: float) -> None:
    """UserError for the first of `values` that is not above 0 and at most 1."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise UserError(f"{name} is {value:g}; it is a share, above 0 and at most 1")


def one_of(what: str, name: str, known: Mapping[str, T]) -> T:
    """`known[name]`; UserError with the nearest names where there is none."""
    if name in known:
        return known[name]
    hint = nearest(name, known) or f"; there is {', '.join(known)}"
    raise UserError(f"{name}: unknown {what}{hint}")


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; empty where none is like it."""
    close = get_close_matches(str(name), list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
