"""Reading an array piece by piece gives what reading it whole gives, wherever the pieces end."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.readers.json_array import read_json
from ropewalk.errors import UserError


class Pieces:
    """The bytes, so many at a time."""

    def __init__(self, content, size):
        self.parts = iter([content[i : i + size] for i in range(0, len(content), size)])

    def read(self, size=-1):
        return next(self.parts, b"")


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.text(max_size=5), VALUE, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(OBJECT, max_size=6),
    size=st.integers(1, 60),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    around=st.sampled_from(["", " ", "\n\n", "\ufeff", "\ufeff\r\n"]),
)
def test_an_array_in_pieces_is_the_array(rows, size, indent, ascii, around):
    text = around + json.dumps(rows, indent=indent, ensure_ascii=ascii) + around.strip("\ufeff")
    content = text.encode()
    found = list(read_json(Pieces(content, size), "a.json"))
    assert [row.value for row in found] == rows
    for row in found:
        assert json.loads(content[row.start : row.end]) == row.value
        assert content[: row.start].count(b"\n") == row.line - 1


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUE, min_size=1, max_size=6), st.integers(1, 60))
def test_what_is_no_object_is_said_in_its_place(values, size):
    """Numbers above all: 12 and 1.5e3 do not end where a piece does."""
    found = list(read_json(Pieces(json.dumps(values).encode(), size), "a.json"))
    assert len(found) == len(values)
    for row, value in zip(found, values, strict=True):
        kind = type(value).__name__
        assert row.value == (value if isinstance(value, dict) else f"must be a JSON object, is {kind}")


@settings(max_examples=200, deadline=None)
@given(st.lists(OBJECT, min_size=1, max_size=4), st.integers(1, 60), st.data())
def test_an_array_without_its_end_is_an_error_after_its_whole_elements(rows, size, data):
    content = json.dumps(rows).encode()
    cut = data.draw(st.integers(1, len(content) - 1))
    found = []
    with pytest.raises(UserError, match=r"a\.json:1: not valid JSON"):
        found.extend(row.value for row in read_json(Pieces(content[:cut], size), "a.json"))
    ends = [len(json.dumps(rows[: i + 1]).encode()) - 1 for i in range(len(rows))]
    assert found == rows[: sum(end <= cut for end in ends)]


def test_a_mistake_is_found_without_reading_all_that_follows():
    pieces = Pieces(b'[{"text": "a"}, {"text": nonsense}' + b', {"text": "b"}' * 100_000, 1000)
    with pytest.raises(UserError, match=r"a\.json:1: not valid JSON \(Expecting value\)"):
        list(read_json(pieces, "a.json"))
    assert len(list(pieces.parts)) > 1490
