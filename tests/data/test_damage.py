"""Damaged, hostile and merely odd files: each is named, none crashes, hangs or fills the memory."""

import gzip
import io
import json
import random
import re
import tracemalloc
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data.readers import Source, files_of, read_source
from ropewalk.data.readers.streams import lines
from ropewalk.data.records import BadRow, Record
from ropewalk.errors import RopewalkError, UserError

from .forms import CRAWL, FORMS, JSONL, PAGE, ROWS, TEXTS, arrow, pdf, tarred, warc, zipped


def read(path, **columns):
    source = Source(str(path), "s", **columns)
    return list(read_source(source, files_of(source)[0]))


def split(records):
    """(texts of the records, the bad rows as text)."""
    texts = [r.text for r in records if isinstance(r, Record)]
    return texts, [str(r) for r in records if isinstance(r, BadRow)]


def parquet(rows, **options):
    sink = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


# --- anything at all ---------------------------------------------------------------------------

EVERYTHING = {
    **FORMS,
    "a.parquet": lambda: parquet(ROWS),
    "a.html": lambda: PAGE.encode(),
    "a.pdf": lambda: pdf("Loose fibre.", "Strands."),
    "a.warc.gz": lambda: warc(*CRAWL[:2]),
    "a.warc": lambda: warc(*CRAWL[:2], compressed=False),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_damage_is_a_crash(name, tmp_path):
    """Bytes changed, cut off or doubled: records, bad rows and errors that name the file; no more."""
    whole, rng = EVERYTHING[name](), random.Random(name)
    for _ in range(30):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at, other = rng.randrange(len(content)), rng.randrange(len(content) + 1)
            match rng.randrange(4):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    content[at] ^= 1 << rng.randrange(8)
                case 2:
                    del content[at:]
                case 3:
                    content[at:at] = content[min(at, other) : max(at, other)]
            if not content:
                break
        path = tmp_path / name
        path.write_bytes(content)
        try:
            for record in read(path):
                assert str(record.where).startswith(str(path))
        except RopewalkError as error:
            assert str(path) in str(error)  # noqa: PT017


# --- compressed --------------------------------------------------------------------------------

LINES = b"".join(json.dumps({"text": f"{i} " * (i % 9)}).encode() + b"\n" for i in range(5000))
COMPRESSED = {
    "gz": gzip.compress(LINES[:70000]) + gzip.compress(LINES[70000:]),
    "zst": zstandard.compress(LINES),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(COMPRESSED)), share=st.floats(0.001, 0.999))
def test_what_comes_before_a_missing_end_is_delivered(tmp_path_factory, kind, share):
    content = COMPRESSED[kind][: int(len(COMPRESSED[kind]) * share)]
    path = tmp_path_factory.mktemp("cut") / f"a.jsonl.{kind}"
    path.write_bytes(content)
    *records, last = read(path)
    assert str(last).startswith(f"{path}: ends in the middle (after {len(content):,} bytes")
    first = zlib.decompressobj(31)
    if kind == "gz":
        there = first.decompress(content)
        there += zlib.decompressobj(31).decompress(first.unused_data)
    else:
        there = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    assert [r.text for r in records] == [json.loads(line)["text"] for line in there.split(b"\n")[:-1]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", JSONL, r"is damaged after byte 0 of the compressed file .*incorrect header"),
        ("a.jsonl.zst", JSONL, r"is damaged after byte 0 of the compressed file"),
        ("a.txt.gz", gzip.compress(b"abc", mtime=0)[:-4], r"ends in the middle"),
        ("a.warc.gz", warc(*CRAWL)[:-40], r"ends in the middle"),
        ("a.tar", tarred("w", **{"a.txt": b"one" * 1000})[:1500], r"not a readable tar archive, or its end"),
    ],
)
def test_damaged_files_are_bad_rows(name, content, reason, write):
    path = write(name, content)
    rows = split(read(path))[1]
    assert re.search(reason, rows[-1]), rows
    assert all(row.startswith(str(path)) for row in rows)


def test_what_follows_a_compressed_file_is_an_error_after_its_rows(write):
    texts, rows = split(read(write("a.jsonl.gz", gzip.compress(JSONL) + b"rubbish")))
    assert texts == TEXTS
    assert len(rows) == 1


def zeros(count):
    """`count` MB of zeros in gzip, without making them all."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(count)]
    return b"".join([*parts, compressor.flush()])


def zstd_zeros(count):
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(count)]
    return b"".join([*parts, compressor.flush()])


HEAD = b"WARC/1.0\r\nWARC-Type: resource\r\nContent-Length: 1000000000\r\n\r\n"
BOMBS = {
    "a.jsonl.gz": lambda: zeros(80),
    "a.txt.zst": lambda: zstd_zeros(80),
    "a.warc.gz": lambda: gzip.compress(HEAD + bytes(80 << 20)),
    "a.tar.gz": lambda: tarred("w:gz", **{"a.jsonl": bytes(80 << 20)}),
    "a.zip": lambda: zipped(**{"a.jsonl": bytes(80 << 20)}),
    "b.zip": lambda: zipped(**{f"{i}.txt": bytes(10 << 20) for i in range(8)}),
    "c.zip": lambda: zipped(**{"a.jsonl.gz": zeros(80)}),
    "d.zip": lambda: zipped(**{"a.parquet": bytes(80 << 20)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(name, write):
    path = write(name, BOMBS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*more than 250 times"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("inner", ["x/inner.zip", "inner.tar.gz", "inner.tgz"])
@pytest.mark.parametrize("outer", ["a.zip", "a.tar"])
def test_archives_in_archives_are_refused_by_name(inner, outer, write):
    content = zipped(**{inner: b"x"}) if outer == "a.zip" else tarred("w", **{inner: b"x"})
    with pytest.raises(UserError, match=rf"{outer}!{inner}: an archive in an archive is not read"):
        read(write(outer, content))


def test_other_members_that_cannot_be_read(write):
    content = bytearray(zipped(**{"a.txt": b"abc" * 100, "b.txt": b"fine"}))
    at = content.index(b"PK\1\2") + 8  # the flags of the first member, in the directory at the end
    content[at] |= 1
    with pytest.raises(UserError, match=r"a\.zip!a\.txt: is encrypted; decrypt"):
        read(write("a.zip", bytes(content)))
    with pytest.raises(UserError, match=r"b\.zip: not a readable zip archive"):
        read(write("b.zip", b"PK rubbish"))
    damaged = bytearray(zipped(**{"a.txt": bytes(range(33, 99)) * 9, "b.txt": b"fine"}))
    damaged[45] ^= 255
    texts, rows = split(read(write("c.zip", bytes(damaged))))
    assert texts == ["fine"], "the rest is read"
    assert "c.zip!a.txt: is damaged" in rows[0]


# --- long rows, memory -------------------------------------------------------------------------


class Endless:
    """A stream of so many bytes, that are never there together: MB of x, a line end, and two rows more."""

    def __init__(self, count):
        tail = b'\n{"text": "b"}\n{"text": "c"}'
        self.parts = iter([b'{"text": "a"}\n', *[b"x" * (1 << 20)] * count, tail])

    def read(self, size=-1):
        return next(self.parts, b"")


def test_a_line_of_2_gb_is_passed_over_without_being_held():
    tracemalloc.start()
    try:
        found = [(start, end, raw and bytes(raw)) for start, end, raw in lines(Endless(2048), limit=8 << 20)]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    long = 14 + (2 << 30)
    assert found[0] == (0, 13, b'{"text": "a"}')
    assert found[1] == (14, long, None)
    assert found[2:] == [(long + 1, long + 14, b'{"text": "b"}'), (long + 15, long + 28, b'{"text": "c"}')]


def test_long_rows_are_bad_rows(write, monkeypatch):
    monkeypatch.setattr("ropewalk.data.readers.rows.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("ropewalk.data.readers.pages.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("ropewalk.data.readers.json_array.MAX_ROW_BYTES", 1000)
    long = "x" * 3000
    texts, rows = split(read(write("a.jsonl", f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}')))
    assert texts == ["a", "b"]
    assert re.search(r"a\.jsonl:2: is longer than", rows[0])
    texts, rows = split(read(write("a.csv", f"text\na\n{long}\nb\n")))
    assert texts == ["a", "b"]
    assert re.search(r"a\.csv:3: is longer than", rows[0])
    with pytest.raises(UserError, match=r"b\.csv:3: not valid CSV \(field larger than field limit"):
        read(write("b.csv", 'text\na\n"' + "open\n" * 500))
    assert re.search(r"a\.txt: is longer than 1,000 bytes", split(read(write("a.txt", long)))[1][0])
    with pytest.raises(UserError, match=r"a\.json:1: not valid JSON \(an element is longer"):
        read(write("a.json", f'[{{"text": "{long * 1000}"}}]'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.tar.gz"])
def test_memory_does_not_grow_with_the_input(name, write):
    """12 MB of rows, of which no more than some MB are there at a time."""
    rows = [{"text": f"{i} " + "rope walk " * 100} for i in range(12_000)]
    if name == "a.parquet":
        content = parquet(rows)
    elif name == "a.arrow":
        sink, large = io.BytesIO(), pa.Table.from_pylist(rows)
        with pa.ipc.new_file(sink, large.schema) as writer:
            writer.write_table(large, 1000)
        content = sink.getvalue()
    else:
        content = "\n".join(json.dumps(row) for row in rows).encode()
        if name == "a.json":
            content = json.dumps(rows).encode()
        elif name == "a.csv":
            content = b"text\n" + "\n".join(row["text"] for row in rows).encode()
        elif name == "a.tar.gz":
            content = tarred("w:gz", **{"a.jsonl": content})
    path = write(name, content)
    del content
    source = Source(str(path), "s")
    records = read_source(source, files_of(source)[0])
    next(records)
    tracemalloc.start()
    try:
        count = sum(record.text == rows[i]["text"] for i, record in enumerate(records, 1))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert count == len(rows) - 1


# --- tables ------------------------------------------------------------------------------------


def test_columns_that_cannot_hold_text_are_refused(write):
    path = write("a.parquet", parquet([{"text": 1}]))
    with pytest.raises(UserError, match=r"a\.parquet: the column text must be text, is int64"):
        read(path)
    path = write("b.parquet", parquet([{"messages": {"role": "user"}}]))
    with pytest.raises(UserError, match=r"b\.parquet: the column messages must be a list of .*, is struct"):
        read(path)
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(UserError, match=r"c\.parquet: two columns are called text"):
        read(write("c.parquet", parquet(twice)))
    none = pa.table({"text": pa.nulls(2)})
    assert split(read(write("d.parquet", parquet(none))))[1][1].endswith(":2: text must be text, is null")


def test_tables_of_one_source_must_agree(write, tmp_path):
    first = write("x/a.parquet", parquet([{"text": "a"}]))
    write("x/b.parquet", parquet([{"text": "b", "more": 1}]))
    assert split(read(tmp_path / "x/*"))[0] == ["a", "b"], "other columns do not matter"
    talk = [{"messages": [{"role": "user", "content": "a"}]}]
    write("x/c.parquet", parquet(talk))
    with pytest.raises(UserError, match=rf"c\.parquet: has messages \(a list\), and {first} has text \("):
        read(tmp_path / "x/*")
    write("x/c.parquet", parquet([{"body": "a"}]))
    with pytest.raises(UserError, match=r"c\.parquet: no column text.*its columns are body"):
        read(tmp_path / "x/*")
    write("x/c.parquet", parquet([{"text": 3}]))
    with pytest.raises(UserError, match=r"c\.parquet: the column text must be text, is int64"):
        read(tmp_path / "x/*")


def test_a_table_without_its_end_is_refused(write):
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        read(write("a.parquet", parquet(ROWS)[:-9]))
    with pytest.raises(UserError, match=r"a\.arrow: not a readable Arrow file"):
        read(write("a.arrow", arrow(pa.ipc.new_file)[:-9]))


def test_strings_that_are_not_utf8_are_bad_rows(write):
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    strange = pa.table({"text": column})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, strange.schema) as writer:
        writer.write_table(strange)
    for path in (write("a.parquet", parquet(strange)), write("a.arrow", sink.getvalue())):
        texts, rows = split(read(path))
        assert texts == ["a", "b"]
        assert re.search(r":2: not UTF-8", rows[0])


def test_offsets_that_point_elsewhere_are_not_followed(write):
    sink, batch = io.BytesIO(), pa.record_batch({"text": pa.array(["a" * 100, "b"])})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    good = sink.getvalue()
    old, new = (b"".join(i.to_bytes(4, "little") for i in x) for x in ((0, 100, 101), (0, 1 << 30, 1 << 30)))
    assert good.count(old) == 1
    with pytest.raises(UserError, match=r"a\.arrow: not a readable Arrow file"):
        read(write("a.arrow", good.replace(old, new)))


# --- pages -------------------------------------------------------------------------------------


def test_pages_without_text_are_bad_rows(write):
    for name, content, reason in (
        (
            "a.html",
            "<html><body><script>x()</script></body></html>",
            "no main text",
        ),
        ("b.html", "", "no main text"),
        ("c.html", "<div>" * 100_000 + "x", "no main text"),
        ("a.pdf", pdf("", ""), "no text in it"),
        ("b.pdf", b"%PDF-1.4 rubbish", "not a readable PDF"),
        ("c.pdf", pdf("Loose fibre.")[:300], "not a readable PDF|no text"),
        ("d.pdf", locked("secret"), "is encrypted; decrypt it first"),
    ):
        (row,) = split(read(write(name, content)))[1]
        assert re.search(rf"{name}: .*({reason})", row), row
    assert split(read(write("e.pdf", locked(""))))[0] == ["Loose fibre."], "no password is needed"


def locked(password):
    from pypdf import PdfReader, PdfWriter

    writer, sink = PdfWriter(PdfReader(io.BytesIO(pdf("Loose fibre.")))), io.BytesIO()
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(sink)
    return sink.getvalue()


def test_web_archives_of_other_things(write):
    texts, rows = split(read(write("a.warc", warc(*CRAWL[:1], compressed=False) + b"rubbish\r\n\r\nmore")))
    assert len(texts) == 1
    assert re.search(r"a\.warc: no WARC record at byte [0-9,]+, after record 2", rows[0])


# --- odd and mixed -----------------------------------------------------------------------------


def test_mixed_newlines_stay_in_texts_and_divide_rows(write):
    assert split(read(write("a.txt", b"one\r\ntwo\rthree\n")))[0] == ["one\r\ntwo\rthree\n"]
    texts, _ = split(read(write("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\n\r\n{"text": "c\\r\\n"}')))
    assert texts == ["a", "b", "c\r\n"]
    assert split(read(write("a.csv", b'text\ra\r\nb\n"c\rd"\r')))[0] == ["a", "b", "c\rd"]


def test_deep_nesting_is_an_error_with_its_line(write):
    with pytest.raises(UserError, match=r"a\.json:2: not valid JSON \(nested too deeply\)"):
        read(write("a.json", '[{"text": "a"},\n{"text": ' + "[" * 200_000))


def test_a_file_that_vanishes_while_it_is_read(write):
    path = write("a.jsonl", JSONL * 1000)
    source = Source(str(path), "s")
    records = read_source(source, files_of(source)[0])
    next(records)
    path.unlink()
    with pytest.raises(RopewalkError, match=r"a\.jsonl: No such file.*it was there a moment ago"):
        list(records)


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "a.jsonl/b.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.jsonl: no text, source, HTML or PDF file in this folder"):
        read(tmp_path / "a.jsonl")
