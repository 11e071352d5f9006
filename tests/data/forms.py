"""Files of every form in which text lies about, as bytes, made here: ROWS in each of FORMS; and pages."""

import gzip
import io
import json
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.feather
import zstandard

PAGE = """<html><head><title>Rope</title></head><body><nav><a href="/">Home</a> <a href="/x">Shop</a></nav>
<article><h1>How rope is laid</h1><p>{}</p><p>{}</p></article>
<footer>Cookies, imprint, terms</footer></body></html>"""
FIRST = "Loose fibre is spun into yarn, and many yarns are formed into a strand under an even tension."
SECOND = "Three strands are laid together, each turned against the others, so that none can come undone."
PAGE = PAGE.format(FIRST, SECOND)
LATIN = PAGE.replace("spun", "späun").encode("latin-1")
ROWS = [{"text": "one", "x": 1}, {"text": "zwei\n", "x": 2}, {"text": "三", "x": 3}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def table():
    return pa.Table.from_pylist(ROWS)


def arrow(new):
    sink = io.BytesIO()
    with new(sink, table().schema) as writer:
        for batch in table().to_batches(max_chunksize=2):
            writer.write_batch(batch)
    return sink.getvalue()


def feather():
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table(), sink)
    return sink.getvalue()


def pdf(*pages):
    """Pages of one line each, from the PDF specification's smallest example (ISO 32000-1, H.2)."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    kids = []
    for text in pages:
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
        kids.append(f"{len(objects) + 1} 0 R")
        resources = f"/Resources << /Font << /F1 3 0 R >> >> /Contents {len(objects)} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} >>")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, offsets = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{i} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    start = len(out)
    out += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n".encode()
    return out + f"startxref\n{start}\n%%EOF\n".encode()


def warc(*pages, compressed=True):
    """A crawl: for each page (url, status, type of content, body) a request and a response."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    sink = io.BytesIO()
    writer = WARCWriter(sink, gzip=compressed)
    writer.write_record(writer.create_warcinfo_record("crawl.warc.gz", {"software": "test"}))
    for url, status, kind, body in pages:
        about = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
        record = writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=about)
        writer.write_record(record)
    return sink.getvalue()


def zipped(**members):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sink.getvalue()


def tarred(mode, **members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


FORMS = {
    "a.ndjson": lambda: JSONL,
    "a.jsonl.gz": lambda: gzip.compress(JSONL[:9]) + gzip.compress(JSONL[9:]) + b"\0" * 100,
    "a.jsonl.zst": lambda: zstandard.compress(JSONL[:9]) + zstandard.compress(JSONL[9:]),
    "a.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "a.json": lambda: b"\xef\xbb\xbf \n" + json.dumps(ROWS, ensure_ascii=False, indent=1).encode() + b"\n",
    "a.csv": lambda: 'text,x\r\none,1\r"zwei\n",2\n\n三,3'.encode(),
    "a.csv.gz": lambda: gzip.compress('text,x\none,1\n"zwei\n",2\n三,3\n'.encode()),
    "a.tsv": lambda: 'text\tx\none\t1\n"zwei\n"\t2\n三\t3\n'.encode(),
    "a.arrow": lambda: arrow(pa.ipc.new_file),
    "b.arrow": lambda: arrow(pa.ipc.new_stream),
    "a.feather": feather,
    "a.zip": lambda: zipped(**{"a.jsonl": JSONL}),
    "b.zip": lambda: zipped(**{"x/b.arrow": arrow(pa.ipc.new_file), "x/.hidden.jsonl": b"{", "x.png": b""}),
    "c.zip": lambda: zipped(**{"a.jsonl.gz": gzip.compress(JSONL)}),
    "a.tar": lambda: tarred("w", **{"one.txt": b"one", "two.md": b"zwei\n", "3.py": "三".encode()}),
    "a.tar.gz": lambda: tarred("w:gz", **{"x/a.jsonl": JSONL, "x/b.png": b"1234"}),
    "a.tar.zst": lambda: zstandard.compress(tarred("w", **{"x/a.csv": 'text\none\n"zwei\n"\n三\n'.encode()})),
    "a.tgz": lambda: tarred("w:gz", **{"b.arrow": arrow(pa.ipc.new_stream)}),
}  # fmt: skip

CRAWL = (
    ("http://a.example/1", "200 OK", "text/html; charset=utf-8", PAGE.encode()),
    ("http://a.example/logo", "200 OK", "image/png", b"\x89PNG"),
    ("http://a.example/gone", "404 Not Found", "text/html", PAGE.encode()),
    ("http://a.example/empty", "200 OK", "text/html", b"<html><body></body></html>"),
    ("http://a.example/2", "200 OK", "text/html; charset=latin-1", LATIN),
    ("http://a.example/3", "200 OK", "text/html; charset=latin-1", PAGE.encode()),
)  # fmt: skip
