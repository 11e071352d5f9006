"""A GGUF file may say anything: whatever it says costs one message that names the file, and no memory."""

import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.model.gguf import GgufFile, GgufTensor, can_dequantize
from ropewalk.model.gguf_config import config_from_gguf
from ropewalk.model.gguf_convert import convert

MB = 1 << 20
STRING, UINT32, ARRAY = 8, 4, 9


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(
    entries: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = bytes(64),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def opened(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return GgufFile.open(path)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    """Every kind of value, tensors of every number of dimensions, in versions 2 and 3."""
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_custom_alignment(64)
    values: dict[str, Any] = {"b": True, "i": -5, "u": 7, "f": 0.5, "s": "Straße", "empty": ""}
    writer.add_bool("b", True)
    writer.add_int64("i", -5)
    writer.add_uint8("u", 7)
    writer.add_float64("f", 0.5)
    writer.add_key_value("s", "Straße", gguf.GGUFValueType.STRING)
    writer.add_key_value("empty", "", gguf.GGUFValueType.STRING)
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    arrays = {
        f"t{n}": np.random.default_rng(n).standard_normal((2, 3, 4, 5)[:n]).astype(np.float32)
        for n in (1, 2, 3, 4)
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for version in (2, 3):
        data = bytearray((tmp_path / "w.gguf").read_bytes())
        data[4] = version
        file = opened(tmp_path, bytes(data))
        assert {k: file.metadata[k] for k in values} == values
        assert file.metadata["words"] == ["a", "", "ü"]
        assert file.metadata["numbers"].tolist() == [1, 2, 3]
        for name, array in arrays.items():
            assert file.tensors[name].shape == array.shape
            np.testing.assert_array_equal(file.read(file.tensors[name]).reshape(array.shape), array)


@pytest.mark.parametrize("values", [[1, 2], []])
@pytest.mark.parametrize(
    "key", ["split.count", "gemma2.rope.scaling.type", "gemma2.attention.sliding_window_pattern"]
)
def test_an_array_where_one_value_belongs_is_refused(key: str, values: list[int]) -> None:
    names = "embedding_length attention.head_count block_count feed_forward_length context_length"
    metadata: dict[str, Any] = {f"gemma2.{name}": 1 for name in names.split()}
    metadata |= {"general.architecture": "gemma2", "gemma2.attention.layer_norm_rms_epsilon": 1e-5}
    embedding = GgufTensor("token_embd.weight", (9, 1), gguf.GGMLQuantizationType.F32, 0, 36)
    file = GgufFile(Path("m.gguf"), metadata | {key: np.array(values)}, {embedding.name: embedding})
    with pytest.raises(UserError, match=r"m\.gguf: this GGUF file cannot be converted"):
        config_from_gguf(file)


HUGE = 1 << 62
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with 'GGUF'"),
    "magic": (build(magic=b"GGML"), "does not begin with 'GGUF'"),
    "version 1": (build(version=1), "version is 1"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "tensor count": (build(tensor_count=HUGE), "claims 4,611,686,018,427,387,904 tensors"),
    "entry count": (build(entry_count=HUGE), "metadata entries, more than"),
    "key length": (build([struct.pack("<Q", HUGE)], entry_count=1, data=bytes(99)), "a metadata key is"),
    "key of two lines": (build([entry("k\n\0", 4, struct.pack("<I", 1))]), r"a metadata key is 'k\\n"),
    "string length": (build([entry("k", STRING, struct.pack("<Q", HUGE))]), "value of 'k' needs"),
    "array length": (
        build([entry("k", ARRAY, struct.pack("<IQ", UINT32, HUGE))]),
        "items in the value of 'k'",
    ),
    "string array length": (
        build([entry("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]),
        "strings in the value of",
    ),
    "nested array": (build([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of arrays"),
    "value type": (build([entry("k", 99, b"")]), "'k' has the unknown type 99"),
    "same key": (build([entry("k", UINT32, b"\1\0\0\0")] * 2), "'k' occurs twice"),
    "not UTF-8": (build([entry("k", STRING, struct.pack("<Q", 2) + b"\xff\xfe")]), "'k' is not UTF-8"),
    "alignment 0": (build([entry("general.alignment", UINT32, bytes(4))]), "general.alignment is 0"),
    "alignment 24": (build([entry("general.alignment", UINT32, b"\x18\0\0\0")]), "general.alignment is 24"),
    "alignment text": (
        build([entry("general.alignment", STRING, string("32"))]),
        "general.alignment is '32'",
    ),
    "dimensions": (
        build(tensors=[string("t") + struct.pack("<I", 1 << 31) + bytes(40)]),
        "2147483648 dimensions",
    ),
    "no dimension": (build(tensors=[string("t") + struct.pack("<I", 0) + bytes(40)]), "0 dimensions"),
    "size 0": (build(tensors=[tensor("t", (4, 0))]), r"the shape \(0, 4\)"),
    "overflowing size": (build(tensors=[tensor("t", (1 << 33, 1 << 33))]), "does not fit the file"),
    "tensor type": (build(tensors=[tensor("t", kind=4711)]), "'t' has the type 4711"),
    "half a block": (build(tensors=[tensor("t", (33,), kind=2)]), "impossible for type Q4_0"),
    "offset": (build(tensors=[tensor("t", offset=1 << 40)]), "does not fit the file"),
    "unaligned": (build(tensors=[tensor("t", offset=8)]), "does not fit the file"),
    "same tensor": (build(tensors=[tensor("t"), tensor("t", offset=32)]), "'t' occurs twice"),
    "overlap": (build(tensors=[tensor("a", (12,)), tensor("b", offset=32)]), "'a' and 'b' overlap"),
    "truncated data": (build(tensors=[tensor("t", (17,))]), "does not fit the file"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_an_error_and_costs_no_memory(lie: str, tmp_path: Path) -> None:
    data, message = LIES[lie]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as error:
            opened(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < MB
    finally:
        tracemalloc.stop()
    assert "file.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.gguf: cannot be read"):
        GgufFile.open(tmp_path / "nowhere.gguf")


QUANTIZED = [k for k in gguf.GGMLQuantizationType if can_dequantize(k)]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
def test_every_type_is_read_as_gguf_dequantizes_it(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and by rows, also when a tensor is larger than what is dequantized at once."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = max(block, 256)
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (7, columns // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("first", np.zeros(5, np.float32))
    writer.add_tensor("x", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw, kind)
    file = GgufFile.open(tmp_path / "t.gguf")
    np.testing.assert_array_equal(file.read(file.tensors["x"]), wanted)
    monkeypatch.setattr("ropewalk.model.gguf.CHUNK_VALUES", 2 * columns)
    np.testing.assert_array_equal(file.read(file.tensors["x"]), wanted)
    np.testing.assert_array_equal(file.read(file.tensors["x"], 3, 2), wanted[3:5])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A complete tiny llama of 12 KB: config, byte-level tokenizer, quantized weights."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|im_end|>", *"abcdefgĠ", "ab", "abc", "Ġa"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    block = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
    }
    block |= {n: (32, 32) for n in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def converts(data: bytes, folder: Path) -> bool:
    """Whether the file converts; anything but UserError in the other case, or 200 MB, fails the test."""
    path = folder / "fuzz.gguf"
    path.write_bytes(data)
    target = folder / "out"
    for old in target.iterdir() if target.exists() else ():
        old.unlink()
    target.mkdir(exist_ok=True)
    message = None
    tracemalloc.start()
    try:
        convert(path, target)
    except UserError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200 * MB
    assert message is None or ("fuzz.gguf" in message and "\n" not in message)
    return message is None


def test_the_file_that_is_fuzzed_is_good(whole: bytes, tmp_path: Path) -> None:
    assert converts(whole, tmp_path)


def test_every_truncation_is_noticed(whole: bytes, tmp_path: Path) -> None:
    for length in range(0, len(whole), 7):
        assert not converts(whole[:length], tmp_path), length


def test_flipped_bits_are_an_error_or_a_model(whole: bytes, tmp_path: Path) -> None:
    """600 files with a few random bits flipped, most of them in the header, where every bit matters."""
    generator = random.Random(0)
    header = whole.index(b"blk.0.ffn_down") + 100
    good = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            at = generator.randrange(header if generator.random() < 0.8 else len(data))
            data[at] ^= 1 << generator.randrange(8)
        good += converts(bytes(data), tmp_path)
    assert 0 < good < 600


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_overwritten_numbers_are_an_error_or_a_model(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """Extreme 32- and 64-bit numbers anywhere in the header."""
    at = data.draw(st.integers(4, 1500))
    size, limit = data.draw(st.sampled_from([(4, 1 << 32), (8, 1 << 64)]))
    value = data.draw(
        st.one_of(st.integers(0, 300), st.integers(limit - 300, limit - 1), st.integers(0, limit - 1))
    )
    changed = whole[:at] + value.to_bytes(size, "little") + whole[at + size :]
    converts(changed, tmp_path)


CONVERT = "import sys; from ropewalk.model import resolve_source; print(resolve_source(sys.argv[1]))"


@pytest.mark.slow
def test_processes_convert_the_same_file_once(whole: bytes, tmp_path: Path) -> None:
    """Three at the same time get the same directory, and nothing else is left behind."""
    (tmp_path / "m.gguf").write_bytes(whole)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ROPEWALK_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "m.gguf")]
    all_of_them = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {process.communicate()[0].strip() for process in all_of_them}
    assert [process.returncode for process in all_of_them] == [0, 0, 0]
    (directory,) = found
    kept = [path.name for path in (tmp_path / "cache" / "gguf").iterdir() if not path.name.endswith(".lock")]
    assert kept == [Path(directory).name]
