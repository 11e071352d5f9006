"""The numbers to which a rule compares an attribute, for drawing them."""

from math import isfinite
from typing import Any

from ropewalk.clean.rules import parsed


def thresholds(expression: str) -> dict[str, list[float]]:
    """Attribute -> numbers in the expression that it is compared to, ascending; by DuckDB's own parser."""
    result: dict[str, set[float]] = {}
    _walk(parsed(expression), result)
    return {name: sorted(values) for name, values in result.items()}


def _walk(node: Any, result: dict[str, set[float]]) -> None:
    if isinstance(node, list):
        for part in node:
            _walk(part, result)
    if not isinstance(node, dict):
        return
    sides = [node.get(name) for name in ("left", "right", "input", "lower", "upper")]
    if node.get("class") in ("COMPARISON", "BETWEEN"):
        names = [side["column_names"][0] for side in sides if side and side.get("class") == "COLUMN_REF"]
        numbers = [value for side in sides if side and (value := _number(side)) is not None]
        for name in names:
            result.setdefault(name, set()).update(numbers)
    for value in node.values():
        _walk(value, result)


def _number(node: dict[str, Any]) -> float | None:
    """A constant as it was written (DuckDB from 1.5 on), or, of earlier versions, as it was understood."""
    if node.get("class") != "CONSTANT":
        return None
    literal, constant = node.get("literal"), node.get("value")
    if isinstance(literal, dict) and literal.get("kind") in ("INTEGER", "NUMERIC", "FLOAT", "DOUBLE"):
        written = float(literal["text"])
        return written if isfinite(written) else None
    if not isinstance(constant, dict):
        return None
    value = constant.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    scale = ((constant.get("type") or {}).get("type_info") or {}).get("scale", 0)  # decimals come as integers
    return value / 10**scale
