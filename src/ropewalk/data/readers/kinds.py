"""What a file holds, by its name."""

from pathlib import PurePosixPath
from typing import NamedTuple

_TEXT = """.txt .text .md .markdown .mdx .rst .adoc .asciidoc .org .tex .py .pyi .pyx .c .h .cc .cpp .cxx
.hh .hpp .hxx .cu .cuh .cs .d .f .f90 .f95 .go .java .kt .kts .rs .scala .swift .m .mm .zig .nim .v .sv
.vhd .vhdl .asm .s .ada .adb .ads .pas .js .cjs .mjs .jsx .ts .tsx .vue .svelte .dart .php .css .scss
.less .rb .pl .pm .lua .r .jl .hs .ml .mli .fs .fsx .clj .cljs .ex .exs .erl .hrl .el .lisp .scm .rkt
.lean .agda .thy .tla .sh .bash .zsh .fish .ps1 .bat .sql .proto .thrift .graphql .cmake .mk .gradle .nix
.tf .yaml .yml .toml .ini""".split()
_KINDS = {
    **dict.fromkeys(_TEXT, "text"),
    ".html": "html", ".htm": "html", ".xhtml": "html", ".pdf": "pdf",
    ".warc": "warc", ".wet": "warc",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
    ".zip": "zip", ".tar": "tar",
}  # fmt: skip
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_SHORT = {".tgz": ("tar", "gzip"), ".tzst": ("tar", "zstd")}

DOCUMENTS = ("text", "html", "pdf")
"""A file of these is one document; folders are read for them."""
TABLES = ("parquet", "arrow")
ARCHIVES = ("zip", "tar")
KNOWN = (
    ".txt, .md and other text, .py and other source code, .html, .pdf, .warc, .jsonl, .json, .csv, .tsv, "
    ".parquet, .arrow, .zip, .tar (the text formats, .warc and .tar also with .gz or .zst)"
)


class Kind(NamedTuple):
    """`content` is what readers are chosen by; `compression` is gzip, zstd or nothing."""

    content: str
    compression: str | None = None


def kind_of(name: str) -> Kind | None:
    """None for what no reader knows. Formats that need seeking (and have compression inside) are not known
    with another one around them."""
    path = PurePosixPath(name.lower())
    if path.suffix in _SHORT:
        return Kind(*_SHORT[path.suffix])
    compression = _COMPRESSED.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    content = _KINDS.get(path.suffix)
    if content is None or (compression and content in ("pdf", "zip", *TABLES)):
        return None
    return Kind(content, compression)


def hidden(parts: tuple[str, ...]) -> bool:
    """Files and folders that are not looked at."""
    return any(part.startswith(".") or part in ("__pycache__", "__MACOSX") for part in parts)
