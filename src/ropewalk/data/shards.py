"""Token shards on disk: a folder with token ids, a bit for each that is scored, and a table of documents.

    tokens-00000.bin     little-endian uint16, or uint32 from a vocabulary of 65,537 on
    scored-00000.bin     one bit for each token, the first in the lowest bit
    documents.parquet    shard, start, end (tokens from the shard's beginning), id, source; in order; and,
                         where documents were given scores, score
    MANIFEST.json        type, counts, and the size and SHA-256 of every file; written last

A document lies in one shard. Its first token is never scored, so that a label never crosses documents.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.errors import RopewalkError
from ropewalk.files import sha256

FORMAT = "ropewalk-shards-1"
SHARD_TOKENS = 1 << 30
_BUFFER_TOKENS = 1 << 20
_TABLE_ROWS = 1 << 16
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_TABLE = pa.schema(
    {"shard": pa.int32(), "start": pa.int64(), "end": pa.int64(), "id": pa.string(), "source": pa.string()}
)

_WRITTEN: dict[str, Any] = {
    "use_dictionary": ["source"],
    "column_encoding": dict.fromkeys(("shard", "start", "end"), "DELTA_BINARY_PACKED"),
}
"""Half the bytes of Parquet's defaults, and the three columns are read four times as fast."""


class DamagedDataError(RopewalkError):
    """Token shards that are not what was written."""


class Document(NamedTuple):
    """tokens [n] unsigned, scored [n] bool."""

    tokens: np.ndarray
    scored: np.ndarray
    id: str
    source: str


class ShardWriter:
    """Writes documents in the order in which they come; `close` makes the folder readable."""

    def __init__(self, directory: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory = directory
        self.documents = self.tokens = self.scored = 0
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._shard_tokens = shard_tokens
        self._shard, self._filled = 0, 0
        self._ids: list[np.ndarray] = []
        self._bits: list[np.ndarray] = []
        self._buffered = 0
        self._rows: list[tuple[int, int, int, str, str]] = []
        self._with_scores = False
        self._scores: list[float] = []
        self._scores_hash = hashlib.sha256()
        self._lengths = hashlib.sha256()
        self._files: list[Path] = []
        self._table: pq.ParquetWriter | None = None
        directory.mkdir(parents=True)

    def add(
        self, ids: np.ndarray, scored: np.ndarray, id: str, source: str, score: float | None = None
    ) -> None:
        """ids [n] of any integer type, scored [n] bool. `score` orders documents in a curriculum, the lowest
        first. Raises ValueError for one that is not finite, and where only some documents have one."""
        if not self.documents:
            self._with_scores = score is not None
        if self._with_scores != (score is not None):
            raise ValueError(f"{id}: all documents have a score, or none")
        if score is not None:
            if not math.isfinite(score):
                raise ValueError(f"{id}: its score is {score}")
            self._scores.append(score)
        if self._filled and self._filled + len(ids) > self._shard_tokens:
            self._flush(everything=True)
            self._shard, self._filled = self._shard + 1, 0
        scored = np.array(scored, dtype=bool)
        scored[:1] = False
        self._ids.append(np.asarray(ids, dtype=_DTYPES[self._dtype]))
        self._bits.append(scored)
        self._rows.append((self._shard, self._filled, self._filled + len(ids), id, source))
        self._filled += len(ids)
        self._buffered += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.scored += int(np.count_nonzero(scored))
        if self._buffered >= _BUFFER_TOKENS:
            self._flush()
        if len(self._rows) >= _TABLE_ROWS:
            self._write_rows()

    def close(self) -> None:
        """Writes what is left, and the manifest."""
        self._flush(everything=True)
        self._write_rows(last=True)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in (*self._files, self.directory / "documents.parquet")
        }
        content = [
            self._dtype,
            self._lengths.hexdigest(),
            *(files[path.name]["sha256"] for path in self._files),
            *([self._scores_hash.hexdigest()] if self._with_scores else []),
        ]
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype,
            "documents": self.documents,
            "tokens": self.tokens,
            "scored": self.scored,
            "shards": self._shard + 1,
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "files": files,
        }
        (self.directory / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")

    def _flush(self, everything: bool = False) -> None:
        """Appends the buffers to the shard's files; the scored bits of a last part byte wait for the next."""
        if not self._ids and not self._bits:
            return
        bits = np.concatenate(self._bits)
        whole = len(bits) if everything else len(bits) // 8 * 8
        self._append("tokens", b"".join(ids.tobytes() for ids in self._ids))
        self._append("scored", np.packbits(bits[:whole], bitorder="little").tobytes())
        self._ids, self._buffered = [], 0
        self._bits = [bits[whole:]] if whole < len(bits) else []

    def _append(self, kind: str, data: bytes) -> None:
        path = self.directory / f"{kind}-{self._shard:05d}.bin"
        if path not in self._files:
            self._files.append(path)
        with open(path, "ab") as file:
            file.write(data)

    def _write_rows(self, last: bool = False) -> None:
        schema = _TABLE.append(pa.field("score", pa.float64())) if self._with_scores else _TABLE
        if self._table is None:  # not before the first document says whether there are scores
            path = self.directory / "documents.parquet"
            self._table = pq.ParquetWriter(path, schema, **_WRITTEN)
        if self._rows:
            columns = dict(zip(_TABLE.names, map(list, zip(*self._rows, strict=True)), strict=True))
            self._lengths.update(np.array([row[2] - row[1] for row in self._rows], dtype="<i8").tobytes())
            self._scores_hash.update(np.array(self._scores, dtype="<f8").tobytes())
            columns |= {"score": self._scores} if self._with_scores else {}
            self._table.write_table(pa.table(columns, schema=schema))
            self._rows, self._scores = [], []
        if last:
            self._table.close()


@dataclass(frozen=True)
class TokenShards:
    """Memory-mapped documents. `lengths`, `starts` (tokens from the shard's beginning) and `shard`, all [n]
    int64, are in memory; ids and sources are read when they are first asked for."""

    directory: Path
    fingerprint: str
    """SHA-256 of the content: tokens, scored bits and lengths, wherever they came from."""
    lengths: np.ndarray
    starts: np.ndarray
    shard: np.ndarray
    tokens: int
    scored: int
    _tokens: tuple[np.ndarray, ...]
    _scored: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, path: str | Path) -> "TokenShards":
        """Checks that everything is there in its full size; `verify` checks every byte.

        Raises DamagedDataError that names the file.
        """
        directory = Path(path)
        manifest = _manifest(directory)
        for name, file in manifest["files"].items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes of {file['bytes']:,}"
                raise DamagedDataError(f"{directory / name}: {found}; prepare the data again")
        shards, dtype = range(manifest["shards"]), _DTYPES[manifest["dtype"]]
        try:
            tokens = tuple(_map(directory / f"tokens-{i:05d}.bin", dtype) for i in shards)
            scored = tuple(_map(directory / f"scored-{i:05d}.bin", np.dtype("u1")) for i in shards)
            table = pq.read_table(directory / "documents.parquet", columns=["shard", "start", "end"])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedDataError(f"{directory}: {error}; prepare the data again") from None
        shard, starts, ends = (table[name].to_numpy().astype(np.int64) for name in ("shard", "start", "end"))
        sizes = np.array([len(part) for part in tokens], dtype=np.int64)
        good = len(shard) == manifest["documents"] and all(
            len(bits) == -(-len(part) // 8) for part, bits in zip(tokens, scored, strict=True)
        )
        good = good and bool(((shard >= 0) & (shard < len(sizes))).all())
        if not good or not ((starts >= 0) & (starts < ends) & (ends <= sizes[shard])).all():
            raise DamagedDataError(
                f"{directory}: the document table does not fit the tokens; prepare the data again"
            )
        counts = (manifest["tokens"], manifest["scored"])
        return cls(directory, manifest["fingerprint"], ends - starts, starts, shard, *counts, tokens, scored)

    def verify(self) -> None:
        """Reads every byte and compares its SHA-256. Raises DamagedDataError that names the file."""
        for name, file in _manifest(self.directory)["files"].items():
            if sha256(self.directory / name) != file["sha256"]:
                raise DamagedDataError(
                    f"{self.directory / name}: its bytes have changed; prepare the data again"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        i = range(len(self))[i]
        at = self.starts[i] + np.arange(self.lengths[i])
        tokens, scored = self._read(int(self.shard[i]), at)
        names, codes = self.sources
        return Document(tokens, scored, self._ids[i].as_py(), names[codes[i]])

    def ids(self, documents: np.ndarray) -> list[str]:
        """The ids of some documents, in the order asked for."""
        return self._ids.take(pa.array(documents)).to_pylist()

    @cached_property
    def sources(self) -> tuple[list[str], np.ndarray]:
        """(names in the order of their first documents, which of them [n] each document comes from: uint16,
        which is sorted fast, or int64)."""
        column = self._column("source", read_dictionary=["source"])
        joined = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        codes = joined.indices.to_numpy()
        first = np.full(len(joined.dictionary), len(codes))
        first[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal indices the last one stays
        order = np.argsort(first)[: np.count_nonzero(first < len(codes))]
        number = np.zeros(len(first), dtype=np.uint16 if len(first) <= 1 << 16 else np.int64)
        number[order] = np.arange(len(order))
        return joined.dictionary.take(pa.array(order)).to_pylist(), number[codes]

    @cached_property
    def scores(self) -> np.ndarray | None:
        """[n] float64; None where documents were given none. Raises DamagedDataError for a hole in them."""
        path = self.directory / "documents.parquet"
        if "score" not in pq.read_schema(path).names:
            return None
        scores = self._column("score").to_numpy().astype(np.float64)
        if not np.isfinite(scores).all():
            raise DamagedDataError(f"{path}: a document without a score; prepare the data again")
        return scores

    def read(self, at: np.ndarray, shard: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and scored (bool) at the places `at` [n], counted from the beginning of a shard: the first
        lengths[0] of them in shard[0], the next lengths[1] in shard[1], and so on. Behind a shard's end its
        last token is read. `at` is used up."""
        if len(self._tokens) == 1:
            return self._read(0, at)
        tokens = np.empty(len(at), dtype=self._tokens[0].dtype)
        scored = np.empty(len(at), dtype=bool)
        for i in np.unique(shard).tolist():
            here = np.flatnonzero(np.repeat(shard == i, lengths))
            tokens[here], scored[here] = self._read(i, at[here])
        return tokens, scored

    def _read(self, shard: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._tokens[shard].take(at, mode="clip")
        within = at.astype(np.uint8)
        within &= 7
        at >>= 3
        bits = self._scored[shard].take(at, mode="clip")
        bits >>= within
        bits &= 1
        return tokens, bits.view(bool)

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self._column("id").combine_chunks()

    def _column(self, name: str, **options: Any) -> pa.ChunkedArray:
        return pq.read_table(self.directory / "documents.parquet", columns=[name], **options)[name]


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "MANIFEST.json"
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise DamagedDataError(
                f"{path}: format {manifest['format']!r}, not {FORMAT!r}; prepare the data again"
            )
        if manifest["dtype"] not in _DTYPES:
            raise KeyError("dtype")
        for name in ("shards", "documents", "tokens", "scored"):
            if not isinstance(manifest[name], int):
                raise KeyError(name)
        for name, file in manifest["files"].items():
            if Path(name).name != name or file.keys() != {"bytes", "sha256"}:
                raise KeyError("files")
    except OSError as error:
        raise DamagedDataError(f"{path}: {error.strerror}; prepare the data again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedDataError(
            f"{path}: not a manifest of token shards ({error}); prepare the data again"
        ) from None
    return manifest


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
