"""Rules over attributes: SQL expressions that say which texts are kept, and the published sets of them."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from ropewalk.clean.step import Step
from ropewalk.errors import UserError


@dataclass(frozen=True)
class Rule:
    """A text is kept unless the expression is false (null is unknown); then `reason` says what is wrong."""

    name: str
    expression: str
    reason: str
    source: str


_GOPHER, _TABLE = "Rae et al. 2021, A1.1", "Rae et al. 2021, table A1"
_C4, _FINEWEB = "Raffel et al. 2020, 2.2", "Penedo et al. 2024, 3.6"

GOPHER = (
    Rule("gopher_words", "words between 50 and 100000", "under 50 words or over 100,000", _GOPHER),
    Rule(
        "gopher_word_length",
        "mean_word_length between 3 and 10",
        "words are on average under 3 or over 10 characters long",
        _GOPHER,
    ),
    Rule("gopher_hashes", "hash_ratio <= 0.1", "more than one # for 10 words", _GOPHER),
    Rule("gopher_ellipses", "ellipsis_ratio <= 0.1", "more than one ellipsis for 10 words", _GOPHER),
    Rule("gopher_bullets", "bullet_lines <= 0.9", "over 90% of the lines begin with a bullet", _GOPHER),
    Rule(
        "gopher_ellipsis_lines", "ellipsis_lines <= 0.3", "over 30% of the lines end in an ellipsis", _GOPHER
    ),
    Rule("gopher_letters", "letter_words >= 0.8", "under 80% of the words have a letter", _GOPHER),
    Rule("gopher_stop_words", "stop_words >= 2", "under two of the commonest English words", _GOPHER),
)
_REPETITION_LIMITS = {
    "duplicate_lines": (0.30, "lines are repeats"),
    "duplicate_paragraphs": (0.30, "paragraphs are repeats"),
    "duplicate_line_characters": (0.20, "characters are in repeated lines"),
    "duplicate_paragraph_characters": (0.20, "characters are in repeated paragraphs"),
    "top_2gram_characters": (0.20, "characters are in the commonest pair of words"),
    "top_3gram_characters": (0.18, "characters are in the commonest run of 3 words"),
    "top_4gram_characters": (0.16, "characters are in the commonest run of 4 words"),
    **{
        f"duplicate_{n}gram_characters": (limit, f"characters are in repeated runs of {n} words")
        for n, limit in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True)
    },
}
GOPHER_REPETITION = tuple(
    Rule(f"gopher_{name}", f"{name} <= {limit}", f"over {limit:.0%} of the {what}", _TABLE)
    for name, (limit, what) in _REPETITION_LIMITS.items()
)
C4 = (
    Rule("c4_sentences", "c4_sentences >= 5", "under 5 sentences in the lines that C4 keeps", _C4),
    Rule("c4_brackets", "curly_brackets = 0", "a curly bracket: likely code", _C4),
    Rule("c4_lorem_ipsum", "not lorem_ipsum", "filler text: lorem ipsum", _C4),
)
FINEWEB = (
    Rule("fineweb_ends", "terminal_lines > 0.12", "12% of the lines or fewer end a sentence", _FINEWEB),
    Rule(
        "fineweb_repeats",
        "repeated_line_characters < 0.1",  # the paper's; datatrove's default is 0.01
        "10% of the characters or more are in repeated lines",
        _FINEWEB,
    ),
    Rule("fineweb_short", "short_lines < 0.67", "67% of the lines or more are at most 30 long", _FINEWEB),
    Rule(
        "fineweb_list",
        "newline_ratio <= 0.3",
        "more than 3 line feeds for 10 words: a list",
        "datatrove, FineWebQualityFilter",
    ),
)
PRESETS: Mapping[str, Sequence[Rule]] = {
    "gopher": GOPHER,
    "gopher_repetition": GOPHER_REPETITION,
    "c4": C4,
    "fineweb": FINEWEB,
}

FUNCTIONS = frozenset(
    "+ - * / // % ** ~~ !~~ ~~* !~~* abs ceil floor round greatest least ln log2 log10 sqrt exp pow "
    "len length lower upper contains starts_with ends_with regexp_matches regexp_full_match "
    "list_contains list_filter list_transform list_sum list_max list_min".split()
)
"""What an expression may call: it depends on the row alone, and reads nothing else."""
_CLASSES = {
    "CONJUNCTION", "COMPARISON", "COLUMN_REF", "CONSTANT", "OPERATOR", "BETWEEN", "CASE", "CAST", "FUNCTION",
    "LAMBDA", "TYPE",
}  # fmt: skip


@cache
def parsed(expression: str) -> Any:
    """DuckDB's syntax tree of a SELECT of the expression; with the key `error` true where it is none.

    Kept, since every unit of the data asks again and a database is opened for each. Not to be changed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise UserError('rules need an extra: pip install "ropewalk[data]"') from error
    with duckdb.connect() as connection:
        found = connection.execute("select json_serialize_sql(?)", [f"select {expression}"]).fetchone()
    try:
        return json.loads(found[0]) if found else {"error": True}
    except RecursionError:
        return {"error": True, "error_message": "too many parts are nested in each other"}


@cache
def columns_of(expression: str, name: str = "rule") -> frozenset[str]:
    """The attributes that an expression over one row asks for, by DuckDB's own parser. `name` is what
    messages call it.

    Raises UserError where it is no expression, or has a subquery, an aggregate, a window, or a function that
    is not in FUNCTIONS (random numbers, files, time).
    """
    said = f"{name} {expression!r}"
    tree = parsed(expression)
    if tree["error"]:
        raise UserError(f"{said}: {tree.get('error_message', 'cannot be read')}")
    node = tree["statements"][0]["node"]
    alone = (
        len(tree["statements"]) == 1
        and node["type"] == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"]["type"] == "EMPTY"
        and not (node["modifiers"] or node["where_clause"] or node["group_expressions"] or node["having"])
        and not (node["qualify"] or node["cte_map"]["map"])
    )
    # A semicolon at the end would stand inside of what the expression is put into.
    if not alone or node["select_list"][0]["alias"] or expression.rstrip().endswith(";"):
        raise UserError(f"{said}: it must be one expression, such as words >= 50")
    columns: set[str] = set()
    _walk(node["select_list"][0], said, frozenset(), columns)
    return frozenset(columns)


def _walk(node: Any, said: str, own: frozenset[str], columns: set[str]) -> None:
    """`own` are the parameters of the lambdas around the node."""
    if isinstance(node, list):
        for part in node:
            _walk(part, said, own, columns)
    if not isinstance(node, dict):
        return
    kind = node.get("class")
    if kind is not None and kind not in _CLASSES:
        raise UserError(f"{said}: {kind.lower()} is not allowed; a rule looks at one text alone")
    if kind == "FUNCTION" and node["function_name"].lower() not in FUNCTIONS:
        names = ", ".join(sorted(name for name in FUNCTIONS if name[0].isalpha()))
        raise UserError(f"{said}: the function {node['function_name']} is not allowed; there are {names}")
    if kind == "COLUMN_REF" and node["column_names"][0] not in own:
        columns.add(node["column_names"][0])
    if kind == "LAMBDA":
        heads: set[str] = set()
        _walk(node["lhs"], said, frozenset(), heads)
        _walk(node["expr"], said, own | heads, columns)
    elif kind != "CONSTANT":
        for value in node.values():
            _walk(value, said, own, columns)


def steps_for(rules: Iterable[Rule], steps: Sequence[Step], others: Collection[str] = ()) -> list[Step]:
    """Those of the steps, in their order, that say what the rules ask for; `others` are columns that are
    there without a step. Raises UserError for a name that nothing says."""
    said = {attribute: step.name for step in steps for attribute in step.attributes}
    wanted = set()
    for rule in rules:
        for column in sorted(columns_of(rule.expression)):
            if column in said:
                wanted.add(said[column])
            elif column not in others:
                known = sorted([*said, *others])
                close = get_close_matches(column, known, 1)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise UserError(
                    f"rule {rule.expression!r}: unknown attribute {column}{hint} There is {', '.join(known)}"
                )
    return [step for step in steps if step.name in wanted]
