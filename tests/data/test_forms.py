"""Every form in which text lies about gives its records, with where they are from; here and behind a URL."""

import gzip
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pytest

from ropewalk.data.readers import Source, cut, files_of, read_source, read_unit
from ropewalk.data.records import Record
from ropewalk.errors import UserError

from .forms import CRAWL, FIRST, FORMS, JSONL, LATIN, PAGE, SECOND, TEXTS, arrow, pdf, tarred, warc, zipped


def good(path, name="s", **columns):
    source = Source(str(path), name, **columns)
    records = list(read_source(source, files_of(source)[0]))
    assert all(isinstance(r, Record) for r in records), records
    return records


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_give_the_same_records(name, write):
    path = write(name, FORMS[name]())
    records = good(path)
    assert [r.text for r in records] == TEXTS
    assert all(r.where.startswith(str(path)) and r.file.startswith(name) for r in records)
    assert len({r.id for r in records}) == 3
    source = Source(str(path), "s")
    assert [r for u in cut(source, files_of(source)[0], 50) for r in read_unit(source, u)] == records


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.tar"])
def test_a_record_says_its_bytes(name, write):
    """start to end, in the decompressed file or member, hold the record and nothing of another."""
    content = FORMS[name]()
    plain = gzip.decompress(content) if name.endswith(".gz") else content
    for record in good(write(name, content)):
        if name == "a.tar":
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                plain = archive.extractfile(record.file.partition("!")[2]).read()
            assert (record.line, plain[record.start : record.end]) == (0, record.text.encode())
            continue
        part = plain[record.start : record.end].decode()
        if "csv" in name or "tsv" in name:
            assert part.strip().strip('"').startswith(record.text.strip())
            assert len(part.split(",")) <= 2
        else:
            assert json.loads(part)["text"] == record.text


def test_members_are_named_by_archive_and_member(write):
    path = write("a.zip", zipped(**{"x/a.jsonl": JSONL, "x/b.md": b"# b"}))
    records = good(path)
    assert [r.id for r in records] == [*(f"s/a.zip!x/a.jsonl:{i}" for i in (1, 2, 3)), "s/a.zip!x/b.md"]
    assert records[0].where == f"{path}!x/a.jsonl:1"
    assert [r.text for r in good(path, text="text")] == TEXTS, "who names columns wants rows"


def test_pages_give_their_main_text(write):
    (record,) = good(write("a.html", PAGE))
    assert FIRST in record.text
    assert SECOND in record.text
    assert "Home" not in record.text
    assert "Cookies" not in record.text
    (latin,) = good(write("b.htm", LATIN.replace(b"<head>", b'<head><meta charset="latin-1">')))
    assert "späun" in latin.text


def test_pdf_gives_the_text_of_its_pages(write):
    (record,) = good(write("a.pdf", pdf("Loose fibre becomes rope.", "", "Three strands.")))
    assert record.text == "Loose fibre becomes rope.\nThree strands."
    (inside,) = good(write("a.tar", tarred("w", **{"a.pdf": pdf("Loose fibre.")})))
    assert inside.text == "Loose fibre."


@pytest.mark.parametrize("compressed", [False, True])
def test_web_archives_give_their_pages_with_url(compressed, write):
    content = warc(*CRAWL, compressed=compressed)
    records = good(write("a.warc.gz" if compressed else "a.warc", content))
    assert [r.url[-2:] for r in records] == ["/1", "ty", "/2", "/3"]
    assert [r.line for r in records] == [2, 5, 6, 7], "the number of the record"
    assert [bool(r.text) for r in records] == [True, False, True, True], "a page without text is no mistake"
    assert "späun" in records[2].text
    plain = gzip.decompress(content) if compressed else content
    for record in records:
        part = plain[record.start : record.end]
        assert part.startswith(b"WARC/1.0\r\n")
        assert part.count(b"WARC/1.0\r\n") == 1
        assert record.url.encode() in part


def test_texts_of_web_archives_are_read(write):
    from warcio.warcwriter import WARCWriter

    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=True)
    about = {"payload": io.BytesIO(FIRST.encode()), "warc_content_type": "text/plain"}
    record = writer.create_warc_record("http://a.example/", "conversion", **about)
    writer.write_record(record)
    (found,) = good(write("a.warc.wet.gz", sink.getvalue()))
    assert (found.text, found.url) == (FIRST, "http://a.example/")


def test_saved_datasets_are_read_in_their_order(write, tmp_path):
    stream = arrow(pa.ipc.new_stream)
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name in names:
        write(f"saved/train/{name}", stream)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    write("saved/train/state.json", json.dumps(state))
    write("saved/train/dataset_info.json", "{}")
    write("saved/dataset_dict.json", '{"splits": ["train"]}')
    records = good(tmp_path / "saved/train")
    assert [r.text for r in records] == TEXTS * 2
    assert records[0].id == f"s/{names[0]}:1"
    with pytest.raises(UserError, match="several splits; add one of them to the path: train"):
        good(tmp_path / "saved")
    (tmp_path / "saved/train" / names[0]).unlink()
    with pytest.raises(UserError, match=r"state\.json: names data-00001.*not whole"):
        good(tmp_path / "saved/train")


def test_folders_are_read_for_documents(write, tmp_path):
    for name in ("a.rst", "b.rs", "c.txt.gz", "d.html", "e.pdf", "f.jsonl", "g.png"):
        content = {"c": gzip.compress(b"text"), "d": PAGE, "e": pdf("text")}.get(name[0], "text")
        write(f"folder/{name}", content)
    files, ignored = files_of(Source(str(tmp_path / "folder"), "s"))
    assert [file.name for file in files] == ["a.rst", "b.rs", "c.txt.gz", "d.html", "e.pdf"]
    assert len(ignored) == 2
    assert len(good(tmp_path / "folder")) == 5


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/w", recursive=True)


@pytest.mark.parametrize("name", FORMS)
def test_urls_give_the_same_records(name, memory):
    memory.pipe(f"/w/{name}", FORMS[name]())
    records = good(f"memory://w/{name}")
    assert [r.text for r in records] == TEXTS
    source = Source(f"memory://w/{name}", "s")
    assert [r for u in cut(source, files_of(source)[0], 30) for r in read_unit(source, u)] == records


def test_urls_of_folders_and_globs(memory, write, tmp_path):
    for name in ("b.txt", "a/z.md", ".hidden.txt", "x.jsonl"):
        memory.pipe(f"/w/f/{name}", JSONL)
        write(f"f/{name}", JSONL)
    here = [r.id for r in good(tmp_path / "f")]
    assert [r.id for r in good("memory://w/f")] == here == ["s/a/z.md", "s/b.txt"]
    assert [r.id for r in good("memory://w/f/*.jsonl")] == [f"s/x.jsonl:{i}" for i in (1, 2, 3)]
    assert [r.id for r in good(f"file://{tmp_path}/f")] == here
    with pytest.raises(UserError, match=r"memory://w/nowhere: no such file or folder"):
        good("memory://w/nowhere")
    with pytest.raises(UserError, match=r"nonsense://x: "):
        good("nonsense://x")


def test_a_url_that_fails_midway_is_named(memory, monkeypatch):
    from ropewalk.errors import RopewalkError

    memory.pipe("/w/a.jsonl", JSONL)
    source = Source("memory://w/a.jsonl", "s")
    files = files_of(source)[0]
    records = read_source(source, files)
    memory.rm("/w/a.jsonl")
    with pytest.raises(UserError, match=r"memory:.*w/a\.jsonl: cannot be opened"):
        next(records)
    memory.pipe("/w/a.jsonl", JSONL)

    def fail(*_):
        raise ValueError("the line is dead")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(RopewalkError, match=r"w/a\.jsonl: cannot be read on \(the line is dead\)"):
        list(read_source(source, files))


@pytest.mark.parametrize("length", [True, False])
def test_web_servers_that_give_no_parts(length):
    pytest.importorskip("aiohttp", reason="fsspec reads the web with aiohttp: pip install aiohttp")
    contents = {"/a.jsonl": JSONL, "/b.arrow": arrow(pa.ipc.new_file), "/c.tgz": FORMS["a.tgz"]()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = contents.get(self.path.partition("?")[0])
            self.send_response(404 if content is None else 200)
            if length:
                self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            for name in ("a.jsonl", "a.jsonl?key=1", "b.arrow", "c.tgz"):
                records = good(f"{base}/{name}")
                assert [r.text for r in records] == TEXTS
                source = Source(f"{base}/{name}", "s")
                units = cut(source, files_of(source)[0], 20)
                assert [r for u in units for r in read_unit(source, u)] == records
            with pytest.raises(UserError, match=rf"{base}/no\.jsonl: cannot be opened"):
                good(f"{base}/no.jsonl")
        finally:
            server.shutdown()
