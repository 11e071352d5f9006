"""Two preparations beside each other: every document is in one class, and the reason is the right one."""

import json
from html.parser import HTMLParser

import pytest

from ropewalk.data.encode import Options
from ropewalk.data.entry import name_sources, prepare_sources
from ropewalk.data.view import View
from ropewalk.look.comparison import CHANGED, COPY, NOT_READ, compare
from ropewalk.look.comparison_page import comparison_page

from .looked_at import all_texts, plan, prepared, words_in


@pytest.fixture(scope="module")
def sides(tmp_path_factory, tokenizers):
    """(folder, the same data with other limits: words >= 8 and words >= 20)."""
    folder = tmp_path_factory.mktemp("comparison")
    made = [prepared(folder, tokenizers["chatml"], plan(shortest)) for shortest in (8, 20)]
    return folder, *(View.open(one.directory) for one in made)


def test_what_a_stricter_rule_removes(sides):
    folder, a, b = sides
    found = compare(a, b)
    counts = [len(words_in(text)) for _, text in all_texts(folder)]
    assert found["only_b"] == {"documents": 0, "tokens": 0, "why": []}
    (why,) = found["only_a"]["why"]
    assert why["why"] == "dropped by short"
    assert why["documents"] == found["only_a"]["documents"] == sum(8 <= n < 20 for n in counts)
    assert sum(why["sources"].values()) == why["documents"]
    assert all(8 <= len(words_in(dict(all_texts(folder))[s["id"]])) < 20 for s in why["samples"])
    assert found["common"]["documents"] == found["b"]["kept"] == sum(20 <= n <= 50 for n in counts)
    assert found["a"]["tokens"] - found["b"]["tokens"] == found["only_a"]["tokens"] == why["tokens"]
    assert found["common"]["tokens"] == [found["b"]["tokens"]] * 2
    assert {rule["rule"]: (rule["a"]["keeps"], rule["b"]["keeps"]) for rule in found["rules"]}["short"] == (
        "words >= 8",
        "words >= 20",
    )


def test_it_reads_the_same_from_the_other_side(sides):
    _, a, b = sides
    there, back = compare(a, b), compare(b, a)
    assert (there["only_a"], there["only_b"]) == (back["only_b"], back["only_a"])
    assert there["lengths"]["a"] == back["lengths"]["b"]
    assert sum(there["lengths"]["a"]) == there["a"]["kept"]


def test_the_same_is_the_same(sides):
    found = compare(sides[1], sides[1])
    assert found["only_a"]["documents"] == found["only_b"]["documents"] == 0
    assert found["common"]["documents"] == found["a"]["kept"]


def test_copies_and_what_was_never_read(tmp_path, tokenizers):
    """A second copy is another document; what was not read was not dropped; line 3 has another text."""
    views = []
    for name, rows in (
        ("a", ["x y z", "x y z", "both", "old", "only here"]),
        ("b", ["both", "x y z", "x y z too", "new"]),
    ):
        path = tmp_path / name / "rows.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        made = prepare_sources(
            name_sources([{"path": str(path)}]),
            [],
            tokenizers["none"],
            Options(32),
            tmp_path / name,
            workers=1,
        )
        views.append(View.open(made.directory))
    found = compare(*views)
    assert {why["why"]: why["documents"] for why in found["only_a"]["why"]} == {
        COPY: 1,
        CHANGED: 1,
        NOT_READ: 1,
    }
    assert {why["why"]: why["documents"] for why in found["only_b"]["why"]} == {CHANGED: 1, NOT_READ: 1}
    assert found["common"]["documents"] == 2


def test_the_page_shows_texts_as_text(sides):
    _, a, b = sides
    text = comparison_page(compare(a, b))
    tags = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert "svg" in tags
    assert not {"script", "img", "iframe", "link"} & tags
    assert "dropped by short" in text
