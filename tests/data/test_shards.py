"""What is written is what is read, bit for bit, and damage is found and named."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data.shards import DamagedDataError, ShardWriter, TokenShards


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    shard_tokens=st.sampled_from([40, 64, 1000]),
    vocab=st.sampled_from([1000, 1 << 16, 1 << 17]),
)
def test_documents_come_back_as_they_were(lengths, shard_tokens, vocab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s") / "train"
    writer = ShardWriter(folder, vocab, shard_tokens=shard_tokens)
    random = np.random.default_rng(len(lengths))
    documents = [(random.integers(0, vocab, n), random.random(n) < 0.5) for n in lengths]
    for i, (ids, scored) in enumerate(documents):
        writer.add(ids, scored, f"id {i}", f"source {i % 2}")
    writer.close()
    shards = TokenShards.open(folder)
    shards.verify()
    assert len(shards) == len(lengths)
    assert shards.lengths.tolist() == lengths
    assert shards.document(0).tokens.dtype == (np.uint16 if vocab <= 1 << 16 else np.uint32)
    for i, (ids, scored) in enumerate(documents):
        read = shards.document(i)
        assert read.tokens.tolist() == ids.tolist()
        assert read.scored.tolist() == [False, *scored[1:].tolist()], "the first token is never scored"
        assert (read.id, read.source) == (f"id {i}", f"source {i % 2}")
    assert shards.tokens == sum(lengths)
    assert shards.scored == sum(int(scored[1:].sum()) for _, scored in documents)


def test_the_table_says_where_every_document_lies(make_shards):
    shards = make_shards([5, 6, 7, 8], shard_tokens=12)
    table = pq.read_table(shards.directory / "documents.parquet").to_pylist()
    assert [(r["shard"], r["start"], r["end"], r["id"], r["source"]) for r in table] == [
        (0, 0, 5, "d0", "even"),
        (0, 5, 11, "d1", "odd"),
        (1, 0, 7, "d2", "even"),
        (2, 0, 8, "d3", "odd"),
    ]
    raw = np.fromfile(shards.directory / "tokens-00001.bin", dtype="<u2")
    assert raw.tolist() == shards.document(2).tokens.tolist()


def test_the_fingerprint_is_of_the_content(make_shards):
    same = make_shards([3, 4, 5]).fingerprint
    assert same == make_shards([3, 4, 5]).fingerprint
    assert same != make_shards([3, 5, 4]).fingerprint
    assert same != make_shards([3, 4, 5], seed=1).fingerprint


def test_long_writes_equal_their_parts(make_shards, monkeypatch):
    """However often the buffers are emptied."""
    once = make_shards([7, 9, 3, 5] * 9)
    monkeypatch.setattr("ropewalk.data.shards._BUFFER_TOKENS", 5)
    monkeypatch.setattr("ropewalk.data.shards._TABLE_ROWS", 3)
    often = make_shards([7, 9, 3, 5] * 9)
    assert once.fingerprint == often.fingerprint
    for name in ("tokens-00000.bin", "scored-00000.bin"):
        assert (once.directory / name).read_bytes() == (often.directory / name).read_bytes()


@pytest.mark.parametrize("name", ["tokens-00000.bin", "scored-00000.bin", "documents.parquet"])
def test_a_short_or_missing_file_is_found_at_opening(name, make_shards):
    shards = make_shards([30, 40])
    path = shards.directory / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedDataError, match=f"{name}: has {len(data) - 1:,} bytes of {len(data):,}"):
        TokenShards.open(shards.directory)
    path.unlink()
    with pytest.raises(DamagedDataError, match=f"{name}: is missing"):
        TokenShards.open(shards.directory)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "scored-00000.bin", "documents.parquet"])
def test_a_changed_byte_is_found_on_demand(name, make_shards):
    shards = make_shards([30, 40])
    path = shards.directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=f"{name}: its bytes have changed"):
        shards.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "not a manifest"),
        (lambda m: "[]", "not a manifest"),
        (lambda m: json.dumps({**m, "format": "other"}), "format 'other'"),
        (lambda m: json.dumps({**m, "dtype": "float64"}), "not a manifest"),
        (lambda m: json.dumps({**m, "documents": 99}), "does not fit the tokens"),
        (lambda m: json.dumps({**m, "tokens": "7"}), "not a manifest"),
        (lambda m: json.dumps({**m, "files": []}), "not a manifest"),
        (lambda m: json.dumps({**m, "files": {"a": 1}}), "not a manifest"),
        (lambda m: json.dumps({**m, "shards": 2}), "tokens-00001"),
        (lambda m: json.dumps({**m, "files": {"../../x": {"bytes": 1, "sha256": ""}}}), "not a manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused(change, message, make_shards):
    shards = make_shards([30, 40])
    path = shards.directory / "MANIFEST.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DamagedDataError, match=message):
        TokenShards.open(shards.directory)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: No such file"):
        TokenShards.open(tmp_path)


def test_documents_outside_the_tokens_are_refused(make_shards):
    import pyarrow as pa

    shards = make_shards([30, 40])
    path = shards.directory / "documents.parquet"
    table = pq.read_table(path)
    moved = table.set_column(2, "end", pa.array([30, 7000], pa.int64()))
    pq.write_table(moved, path)
    manifest = json.loads((shards.directory / "MANIFEST.json").read_text())
    manifest["files"]["documents.parquet"]["bytes"] = path.stat().st_size
    (shards.directory / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedDataError, match="does not fit the tokens"):
        TokenShards.open(shards.directory)
