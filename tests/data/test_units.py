"""However a source is cut, its units one after the other are the source."""

import hashlib
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data.readers import Source, cut, files_of, read_source, read_unit, survey
from ropewalk.data.records import BadRow, Record
from ropewalk.errors import UserError


def both(path, size, **columns):
    """(all records at once, the units, all records unit by unit)."""
    source = Source(str(path), "s", **columns)
    files = files_of(source)[0]
    units = pickle.loads(pickle.dumps(cut(source, files, size)))
    json.dumps([piece.key() for unit in units for piece in unit])
    return list(read_source(source, files)), units, [r for unit in units for r in read_unit(source, unit)]


LONG = b'{"text": "' + b"x" * 90 + b'"}'
LINE = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=30)}).map(lambda row: json.dumps(row).encode()),
    st.fixed_dictionaries({"text": st.text("äλ字", max_size=9)}).map(
        lambda row: json.dumps(row, ensure_ascii=False).encode()
    ),
    st.sampled_from([b"", b"  ", b"{", b"[]", b'{"text": 1}', b'{"a": 1}', b'{"text": "\xff"}', LONG]),
)
FILE = st.tuples(st.lists(LINE, max_size=25), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
"""Lines, what they end with, and whether the last one does."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FILE, min_size=1, max_size=4), st.integers(1, 400))
def test_units_one_after_the_other_are_the_source(tmp_path_factory, files, size):
    folder = tmp_path_factory.mktemp("units")
    for i, (lines, end, last) in enumerate(files):
        content = b'{"text": "head"}' + end + end.join(lines) + (end if last else b"")
        (folder / f"{i}.jsonl").write_bytes(content)
    at_once, units, by_units = both(folder / "*.jsonl", size)
    assert by_units == at_once
    for unit in units:
        weights = [piece.end - piece.start for piece in unit]
        assert len(weights) == 1 or sum(weights) <= size, "only a line that is longer makes a unit longer"
    for record in at_once:
        if isinstance(record, Record):
            raw = (folder / record.file).read_bytes()
            assert json.loads(raw[record.start : record.end])["text"] == record.text
            assert raw[: record.start].count(b"\n") == record.line - 1


def test_large_files_are_cut_and_small_ones_put_together(write, tmp_path):
    write("a/1.jsonl", '{"text": "abc"}\n' * 1000)  # 16 bytes each
    for i in range(2, 10):
        write(f"a/{i}.jsonl", '{"text": "abc"}\n')
    at_once, units, by_units = both(tmp_path / "a/*.jsonl", 1600)
    assert by_units == at_once
    assert len(by_units) == 1008
    assert [len(unit) for unit in units] == [1] * 10 + [8]
    assert [piece.first_line for (piece,) in units[:3]] == [1, 101, 201]


def test_pieces_have_the_columns_of_the_files_first_row(write):
    rows = [{"text": "a"}] * 5 + [{"messages": [{"role": "user", "content": "b"}], "text": "c"}] * 5
    at_once, units, by_units = both(write("a.jsonl", "\n".join(json.dumps(row) for row in rows)), 100)
    assert len(units) > 2
    assert by_units == at_once
    assert [r.text for r in by_units] == ["a"] * 5 + ["c"] * 5


def test_one_long_line_does_not_make_many_pieces_after_it(write):
    path = write("a.jsonl", json.dumps({"text": "x" * 5000}) + "\n" + '{"text": "abc"}\n' * 200)
    at_once, units, by_units = both(path, 500)
    assert by_units == at_once
    assert len(units) <= 2 + 3200 // 500 + 1


@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_parquet_is_cut_between_row_groups(write, size):
    path = write("a.parquet", "")
    rows = [{"text": f"text {i}"} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    at_once, units, by_units = both(path, size)
    assert by_units == at_once
    assert [r.line for r in by_units] == list(range(1, 101))
    assert len(units) == {1: 15, 1 << 20: 1}.get(size, len(units))


def test_other_files_are_whole(write, tmp_path):
    write("a/a.csv", "text\n" + "abc\n" * 100)
    write("a/b.json", json.dumps([{"text": "a"}] * 50))
    write("a/c.txt", "abc " * 500)
    at_once, units, by_units = both(tmp_path / "a/*", 100)
    assert by_units == at_once
    assert [len(unit) for unit in units] == [1, 1, 1]


def test_the_survey_hashes_what_is_there(write):
    for name, content in {"a.jsonl": b"{}\n" * 1_000_000, "b.txt": b"abc", "c.jsonl": b""}.items():
        path = write(name, content)
        (file,), _ = files_of(Source(str(path), "s"))
        found = survey(file, 1000)
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        assert sum(piece.size for piece in found.pieces) == len(content)


def test_a_file_that_vanishes_is_named(write):
    path = write("b.txt", "x")
    (file,), _ = files_of(Source(str(path), "s"))
    path.unlink()
    with pytest.raises(UserError, match=r"b\.txt: No such file"):
        survey(file)


def test_surveys_can_be_given(write, monkeypatch):
    source = Source(str(write("a.jsonl", '{"text": "abc"}\n' * 100)), "s")
    files = files_of(source)[0]
    surveys = [survey(file, 160) for file in files]
    expected = cut(source, files, 160)
    monkeypatch.setattr("ropewalk.data.readers.units.survey", None)
    assert cut(source, files, 160, surveys) == expected
    assert len(expected) == 10


def test_bad_rows_have_the_same_numbers_in_pieces(write):
    path = write("a.jsonl", '{"text": "abc"}\n' * 50 + "{\n" + '{"text": "abc"}\n' * 50)
    at_once, _, by_units = both(path, 100)
    assert [str(r).split(": ")[0] for r in by_units if isinstance(r, BadRow)] == [f"{path}:51"]
    assert by_units == at_once


@pytest.mark.parametrize("name", ["peps.jsonl", "rust_book.jsonl", "gsm8k_test.jsonl", "wikitext2_test.txt"])
def test_real_text_in_units_is_the_text(name, shared):
    columns = {"prompt": "question", "completion": "answer"} if name.startswith("gsm8k") else {}
    at_once, units, by_units = both(shared / "data" / name, 200_000, **columns)
    assert by_units == at_once
    assert all(isinstance(r, Record) for r in at_once)
    assert len(units) > 1 or name.endswith(".txt")
