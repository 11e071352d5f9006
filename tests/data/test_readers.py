"""Every kind of file gives its records, each with a stable id; every mistake is named with file and line."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ropewalk.data.readers import InputFile, Source, files_of, read_source
from ropewalk.data.records import BadRow, Record
from ropewalk.errors import RopewalkError, UserError


def read(path, name="src", **columns):
    source = Source(str(path), name, **columns)
    return list(read_source(source, files_of(source)[0]))


def good(path, **columns):
    records = read(path, **columns)
    assert all(isinstance(r, Record) for r in records), records
    return records


def bad(path, **columns):
    """The bad rows as text."""
    return [str(r) for r in read(path, **columns) if isinstance(r, BadRow)]


ROWS = [{"text": "one", "x": 1}, {"text": "zwei\n", "x": None}]


def test_all_row_formats_give_the_same_records(write):
    lines = "\n".join(json.dumps(r) for r in ROWS)
    jsonl = good(write("a.jsonl", "\ufeff" + lines + "\n\n"))
    array = good(write("a.json", json.dumps(ROWS, indent=1)))
    lines_named_json = good(write("b.json", lines))
    csv = good(write("a.csv", 'text,x\none,1\n"zwei\n",\n'))
    path = write("a.parquet", "")
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    for records in (jsonl, array, lines_named_json, csv, good(path)):
        assert [r.text for r in records] == ["one", "zwei\n"]
        assert {r.source for r in records} == {"src"}
    assert [r.id for r in jsonl] == ["src/a.jsonl:1", "src/a.jsonl:2"]
    assert [r.where.rpartition(":")[2] for r in array] == ["2", "6"], "the line an object starts on"
    assert [r.where.rpartition(":")[2] for r in csv] == ["2", "3"]
    assert [r.id for r in good(path)] == ["src/a.parquet:1", "src/a.parquet:2"]


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_conversations_and_pairs_and_named_columns(write):
    row = {"messages": MESSAGES, "prompt": "p", "completion": "c", "text": "t", "q": "Q", "a": "A"}
    path = write("a.jsonl", json.dumps(row))
    assert good(path)[0].messages == tuple(MESSAGES), "messages come first where nothing is named"
    assert good(path, text="text")[0].text == "t"
    named = good(path, prompt="q", completion="a")[0]
    assert (named.prompt, named.completion) == ("Q", "A")
    assert good(path, prompt="q")[0].completion == "c"
    del row["messages"]
    assert good(write("b.jsonl", json.dumps(row)))[0].prompt == "p", "then a pair"
    csv = write("c.csv", "messages\n" + '"' + json.dumps(MESSAGES).replace('"', '""') + '"\n')
    assert good(csv)[0].messages == tuple(MESSAGES)
    parquet = write("d.parquet", "")
    pq.write_table(
        pa.Table.from_pylist([{"messages": [{**MESSAGES[0], "name": None}, MESSAGES[1]]}]), parquet
    )
    assert good(parquet)[0].messages == tuple(MESSAGES), "keys without a value are dropped"


def test_equal_content_has_equal_hashes_wherever_it_is_from(write):
    pair = good(write("a.jsonl", json.dumps({"prompt": "a", "completion": "b"})))[0]
    talk = good(write("b.jsonl", json.dumps({"messages": MESSAGES})))[0]
    assert pair.content_hash() == talk.content_hash()
    assert talk.content_hash() != good(write("c.txt", "a"))[0].content_hash()


def test_folders_are_read_whole_in_a_fixed_order(write, tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "A.TXT", ".hidden/x.txt", "__pycache__/x.py", ".y.txt"):
        write(f"folder/{name}", name)
    write("folder/image.png", b"\x89PNG\0")
    source = Source(str(tmp_path / "folder"), "folder")
    files, ignored = files_of(source)
    assert [file.name for file in files] == ["A.TXT", "a/b/c.py", "a/z.md", "b.txt"]
    assert [Path(path).name for path in ignored] == ["image.png"]
    records = list(read_source(source, files))
    assert [r.id for r in records] == ["folder/A.TXT", "folder/a/b/c.py", "folder/a/z.md", "folder/b.txt"]
    assert [r.text for r in records] == ["A.TXT", "a/b/c.py", "a/z.md", "b.txt"]


def test_globs_take_files_and_folders(write, tmp_path):
    write("x/one.txt", "1")
    write("x/deep/two.txt", "2")
    write("y.txt", "3")
    assert [r.id for r in good(tmp_path / "*")] == ["src/x/deep/two.txt", "src/x/one.txt", "src/y.txt"]
    assert [r.text for r in good(tmp_path / "x" / "**" / "*.txt")] == ["2", "1"]
    assert [r.id for r in good(tmp_path / "?.txt")] == ["src/y.txt"]


def test_a_file_that_names_its_source_has_a_short_id(write):
    assert read(write("a.txt", "x"), name="a.txt")[0].id == "a.txt"
    assert read(write("a.jsonl", '{"text": "x"}'), name="a.jsonl")[0].id == "a.jsonl:1"


def test_text_loses_its_byte_order_mark(write):
    assert good(write("a.txt", b"\xef\xbb\xbfhello"))[0].text == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]', r"a\.jsonl:3: must be a JSON object, is list"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', r"a\.jsonl:2: text must be text, is a number"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', r"a\.jsonl:2: text must be text, is null"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"a\.jsonl:2: text is missing; there is txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 10"),
        ("a.jsonl", '{"text": "a\\ud800b"}', r"a\.jsonl:1: text is not valid Unicode at character 1"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.txt", b"MZ\x90\0\x03", r"a\.txt: not a text file \(NUL byte at offset 3\)"),
        ("a.py", b"x = '\xe4'", r"a\.py: not UTF-8 text \(byte at offset 5\)"),
        ("a.csv", "text,x\na,1\nb\nc,2\n", r"a\.csv:3: has 1 fields; the header has 2"),
        ("a.jsonl", '{"messages": []}', r"a\.jsonl:1: messages is empty"),
        ("a.jsonl", '{"messages": "hello"}', r"a\.jsonl:1: messages is text, not a list"),
        ("a.jsonl", '{"messages": 3}', r"messages must be a list of \{role, content\}, is a number"),
        ("a.jsonl", '{"messages": ["a"]}', r"messages\[0\] must be an object with role and content, is text"),
        (
            "a.jsonl",
            '{"messages": [{"content": "a"}]}',
            r"messages\[0\]\.role must be one of system.*is missing",
        ),
        ("a.jsonl", '{"messages": [{"role": "gpt", "content": "a"}]}', r"is 'gpt'; did you mean assistant\?"),
        ("a.jsonl", '{"messages": [{"role": "User", "content": "a"}]}', r"is 'User'; did you mean user\?"),
        ("a.jsonl", '{"messages": [{"role": ["x"], "content": "a"}]}', r"messages\[0\]\.role must be one of"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"messages\[0\]\.content is missing; there is role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', r"content must be text, is a list"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": " "}]}',
            r"messages\[0\]\.content \(user\) is empty",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": ""}', r"a\.jsonl:1: completion is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', r":2: .*the key 'text' is there twice"),
        ("a.jsonl", '{"text": "a", "x": {"y": 1, "y": 1}}', r":1: .*the key 'y' is there twice"),
        ("a.jsonl", '{"text": "a\\u0000b"}', r"a\.jsonl:1: text has a NUL at character 1"),
        ("a.jsonl", b'{"text": "a\0b"}', r"a\.jsonl:1: not valid JSON \(Invalid control character"),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", r"a\.jsonl:1: not valid JSON \(Exceeds"),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}', r"a\.jsonl:1: .*; end lines with \\n, not with \\r"),
        ("a.jsonl", '{"text": "a", "n":', r"a\.jsonl:1: not valid JSON \(.*\); .* does not end on this line"),
        ("a.jsonl", '{"text": "a b', r"a\.jsonl:1: not valid JSON \(.*\); .* does not end on this line"),
        ("a.json", '\n{"text": "a", "n":', r"a\.json:2: not valid JSON \(.*\); .* does not end on this line"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 \(byte 0"),
        ("a.csv", b"text\nfine\n\xff\nfine\n", r"a\.csv:3: not UTF-8 \(byte 0 of a line\)"),
        ("a.csv", b"text\nfine\na\0b\n", r"a\.csv:3: text has a NUL at character 1"),
    ],
)
def test_bad_rows_are_named_and_the_rest_is_read(name, content, message, write):
    (row,) = bad(write(name, content))
    assert re.search(message, row), row


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.jsonl", '{"body": "a", "id": 1}', {}, r"no column text, nor messages.*its columns are body, id"),
        ("a.jsonl", '{"text": "a"}', {"text": "body"}, r"a\.jsonl: no column body; its columns are text"),
        ("a.jsonl", '{"q": "a"}', {"prompt": "q"}, r"no column completion; its columns are q"),
        ("a.jsonl", '{"q": "a"}', {"prompt": "q", "text": "t"}, r"name one of text, messages, and prompt"),
        ("a.txt", "a", {"text": "body"}, r"a\.txt: is a text file; data source src names columns"),
        ("a.json", '[{"text": "a"},\n{"text": }]', {}, r"a\.json:2: not valid JSON"),
        ("a.json", '[{"text": "a"}\n\n{"text": "b"}]', {}, r"a\.json:3: not valid JSON \(a comma"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', {}, r"a\.json:2: not UTF-8"),
        ("a.csv", 'text\nfine\n"open', {}, r"a\.csv:3: not valid CSV"),
        ("a.csv", b"t\xffxt\nfine\n", {}, r"a\.csv:1: not UTF-8 \(byte 1"),
        ("a.csv", "text,x,text\na,b,c", {}, r"a\.csv:1: two columns are called 'text'"),
        ("a.json", '[{"text": "a"}] [', {}, r"a\.json:1: not valid JSON \(something follows"),
        ("a.json", '[{"text": "a"},', {}, r"a\.json:1: not valid JSON"),
        ("a.parquet", b"PAR1 not really", {}, r"a\.parquet: not a readable Parquet file"),
        ("a.xyz", "a", {}, r"a\.xyz: unknown extension '\.xyz'; known are \.txt"),
    ],
)
def test_unusable_files_are_refused_by_name(name, content, columns, message, write):
    with pytest.raises(UserError, match=message):
        read(write(name, content), **columns)


def test_missing_paths_and_folders_without_text(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder \(data source src\)"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="matches no file"):
        read(tmp_path / "*.jsonl")
    write("folder/a.jsonl", "{}")
    with pytest.raises(UserError, match=r"no text, source, HTML or PDF file in this folder; .*r/\*\.jsonl"):
        read(tmp_path / "folder")


def test_what_is_no_file_is_refused_and_not_waited_for(write, tmp_path):
    write("folder/a.txt", "a")
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    for path, name in (("folder", "pipe.txt"), ("folder/pipe.txt", "pipe.txt"), ("*.jsonl", "lost.jsonl")):
        with pytest.raises(UserError, match=rf"{name}: neither a file nor a link to one"):
            read(tmp_path / path)
    for path in ("~nobody-of-this-name/a.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(UserError, match=r"no such file or folder"):
            read(path)
    with pytest.raises(UserError, match="data source src: its path is empty"):
        read("")


def test_damaged_members_are_bad_rows_whatever_they_are_compressed_with(write):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", method) as archive:
            archive.writestr("a.txt", bytes(range(33, 99)) * 9)
            archive.writestr("b.txt", b"fine")
        content = bytearray(sink.getvalue())
        content[60] ^= 255
        records = read(write("a.zip", bytes(content)))
        assert [r.text for r in records if isinstance(r, Record)] == ["fine"], "the rest is read"
        assert "a.zip!a.txt: is damaged" in str(records[0])


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    source = Source(str(tmp_path), "s")
    with pytest.raises(UserError, match=r"a\.jsonl: No such file"):
        list(read_source(source, [InputFile(str(tmp_path / "a.jsonl"), "a.jsonl")]))


def test_reading_is_streaming(write):
    """The first record of a long file comes before its end has been read; its end is missed."""
    path = write("a.jsonl", '{"text": "a"}\n' * 200_000)
    source = Source(str(path), "s")
    records = read_source(source, files_of(source)[0])
    assert isinstance(next(records), Record)
    Path(path).write_text("")  # what is in the buffer may still come; 200,000 rows may not
    rest = []
    with pytest.raises(RopewalkError, match=r"a\.jsonl: changed while it was read"):
        rest.extend(records)
    assert len(rest) < 100_000
