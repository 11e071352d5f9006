"""Rules are safe expressions over known attributes, and the published ones hold what was published."""

import contextlib

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.clean.c4 import C4
from ropewalk.clean.quality import Quality
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.rules import PRESETS, Rule, columns_of, steps_for
from ropewalk.clean.step import Texts
from ropewalk.errors import UserError

from .samples import ODD

STEPS = [Quality(), Repetition(), C4()]


def rule(expression: str) -> Rule:
    return Rule("mine", expression, "", "")


@pytest.mark.parametrize(
    ("expression", "columns"),
    [
        ("words >= 50 and language = 'en'", {"words", "language"}),
        ('"odd name" in (1, 2) or not a', {"odd name", "a"}),
        ("case when a then b else c end is null", {"a", "b", "c"}),
        ("len(list_filter(pii, s -> s.kind = 'email' and s.start > words)) = 0", {"pii", "words"}),
        ("lower(source) like '%words%' and cast(x as double) / 2 between y and 1", {"source", "x", "y"}),
        ("true", set()),
    ],
)
def test_the_columns_of_an_expression(expression, columns):
    assert columns_of(expression) == columns


@pytest.mark.parametrize(
    "expression",
    [
        "read_text('x') = ''",
        "exists(select 1)",
        "words > (select 1)",
        "random() < 0.5",
        "sum(words) > 1",
        "count(*) over () > 1",
        "*",
        "columns('w.*') > 1",
        "words > ?",
        "getenv('HOME') = ''",
        "words from t",
        "words, lines",
        "words as lines",
        "1; drop table t",
        "words limit 1",
        "words >",
        "",
        "words >= 50;",
        "1 < 1" + " + 1" * 600,
    ],
)
def test_what_is_no_expression_over_one_row_is_refused(expression):
    with pytest.raises(UserError, match="rule "):
        columns_of(expression)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("words lines 1 2 ( ) < = + , ; * from select not and or -- 'x'".split())))
def test_what_is_accepted_says_one_value_for_each_row(parts):
    expression = " ".join(parts)
    with contextlib.suppress(UserError, duckdb.Error), duckdb.connect() as connection:
        columns_of(expression)
        connection.execute("create table t as select 1 as words, 2 as lines from range(3)")
        assert len(connection.execute(f"select (\n{expression}\n) from t").fetchall()) == 3


def test_only_the_steps_that_are_asked_for_run():
    assert [s.name for s in steps_for([rule("top_2gram_characters < 1")], STEPS)] == ["repetition"]
    assert steps_for([rule("source = 'x'")], STEPS, others={"source"}) == []
    with pytest.raises(UserError, match=r"unknown attribute word; did you mean words\?.*There is .*bytes"):
        steps_for([rule("word > 1")], STEPS)
    with pytest.raises(UserError, match=r"unknown attribute zzzz\. There is .*bytes"):
        steps_for([rule("zzzz > 1")], STEPS)


def test_every_published_rule_can_be_evaluated_and_drops_something():
    """On texts of which each breaks some rule; the table is as the steps write it."""
    bad = [
        *ODD,
        "the be # " * 40,
        "the and ... " * 30,
        "the way …\n" * 60,
        "- the point and that\n" * 20,
        "12345 678 the and " * 20,
        "Lorem ipsum {dolor}",
        "supercalifragilistic " * 60,
        "12 characters\n" * 40,
        "the be to of and " * 30,
    ]
    good = " ".join(f"The number {i * 977} and its neighbour were there often." for i in range(9))
    texts = Texts([*bad, good.replace(". ", ".\n")])
    tables = [step.map(texts) for step in STEPS]
    with duckdb.connect() as connection:
        connection.register("data", tables[0].append_column("row", [list(range(len(texts)))]))
        for name, rules in PRESETS.items():
            assert [s.name for s in steps_for(rules, STEPS)], name
            for one in rules:
                step = steps_for([one], STEPS)[0]
                connection.register("data", tables[STEPS.index(step)])
                kept = [row[0] for row in connection.execute(f"select {one.expression} from data").fetchall()]
                assert not all(kept), one
                assert one.reason
                assert one.source
                if name == "gopher":
                    assert kept[-1], one


def test_the_thresholds_are_those_published():
    published = {
        "top_2gram_characters": 0.20,
        "top_3gram_characters": 0.18,
        "top_4gram_characters": 0.16,
        "duplicate_5gram_characters": 0.15,
        "duplicate_10gram_characters": 0.10,
        "duplicate_lines": 0.30,
        "duplicate_line_characters": 0.20,
    }
    expressions = {r.expression for r in PRESETS["gopher_repetition"]}
    assert {f"{name} <= {limit}" for name, limit in published.items()} <= expressions
    assert len(expressions) == 13
