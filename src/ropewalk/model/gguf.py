"""Reads GGUF files (the specification: github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3.

A GGUF file is untrusted. Every count, length, offset and size in the header is compared with the bytes
that are really there before anything of that size is made, so a lying header costs an error message and
no memory. `gguf.GGUFReader` does none of this and needs seconds for what takes a tenth of one here; the
`gguf` package is used for what it is good at: the table of types and `gguf.quants.dequantize`.
"""

import math
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from ropewalk.errors import UserError

MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65535
CHUNK_VALUES = 1 << 22
"""Values dequantized at once: 16 MB of float32."""

_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is row-major (NumPy's order, the reverse of the file's)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Quantization blocks lie within rows: along the last axis."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file; `metadata` holds Python scalars, NumPy arrays and lists of str."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Reads and checks the header; raises UserError, naming the file and the fault."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                return _parse(path, _Header(path, file))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    def read(self, tensor: GgufTensor, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Dequantized float32 rows `[rows, shape[-1]]` of a tensor (all of them by default)."""
        rows = tensor.rows - first_row if rows is None else rows
        width = tensor.shape[-1]
        row_bytes = tensor.nbytes // tensor.rows
        step = max(1, CHUNK_VALUES // width)
        values = np.empty((rows, width), np.float32)
        with open(self.path, "rb") as file:
            file.seek(tensor.offset + first_row * row_bytes)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(file, np.uint8, count * row_bytes)
                if raw.size != count * row_bytes:
                    raise UserError(f"{self.path}: the file became shorter while {tensor.name!r} was read")
                # bfloat16, float16 and the block types all hold scales that may overflow in a damaged file
                with np.errstate(all="ignore"):
                    values[start : start + count] = dequantize(raw.reshape(count, row_bytes), tensor.type)
        return values


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether the installed `gguf` can turn this type into float32."""
    if kind == GGMLQuantizationType.F32:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Header:
    """A cursor that never reads, and never asks for, more than the file has left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def fail(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: not a usable GGUF file: {problem} (at byte {self.at:,} of {self.size:,})"
        )

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"{what} needs {count:,} bytes: the file is truncated or its header is wrong")
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"{what} could not be read")
        self.at += count
        return data

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A 64-bit count of things that take at least `smallest` bytes each."""
        value = self.number("Q", what)
        if value > (self.size - self.at) // smallest:
            raise self.fail(f"the header claims {value:,} {what}, more than the file has room for")
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} is {length:,} bytes long")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None


def _parse(path: Path, header: _Header) -> GgufFile:
    if header.size < 24 or header.take(4, "the magic number") != b"GGUF":
        raise UserError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    version = header.number("I", "the version")
    if version & 0xFFFF == 0:
        raise header.fail("it is big-endian; convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise header.fail(f"its version is {version}; 2 and 3 can be read")
    tensor_count = header.count(33, "tensors")
    metadata_count = header.count(13, "metadata entries")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = header.string("a metadata key", MAX_KEY_BYTES)
        if not key.isprintable():  # it stands in messages
            raise header.fail(f"a metadata key is {key!r}")
        if key in metadata:
            raise header.fail(f"the key {key!r} occurs twice")
        metadata[key] = _value(header, key)

    infos = [_tensor_info(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.fail(f"general.alignment is {alignment!r}; it must be a power of two")
    start = -(-header.at // alignment) * alignment
    return GgufFile(path, metadata, _place(header, infos, start, alignment))


def _value(header: _Header, key: str) -> Any:
    what = f"the value of {key!r}"
    kind = _value_type(header, what)
    if kind == GGUFValueType.STRING:
        return header.string(what)
    if kind != GGUFValueType.ARRAY:
        return _scalars(header, kind, 1, what)[0].item()
    kind = _value_type(header, what)
    if kind == GGUFValueType.ARRAY:
        raise header.fail(f"{what} is an array of arrays, which nothing here uses")
    if kind == GGUFValueType.STRING:
        return [header.string(what) for _ in range(header.count(8, f"strings in {what}"))]
    return _scalars(header, kind, header.count(np.dtype(_SCALARS[kind]).itemsize, f"items in {what}"), what)


def _value_type(header: _Header, what: str) -> GGUFValueType:
    kind = header.number("I", what)
    try:
        return GGUFValueType(kind)
    except ValueError:
        raise header.fail(f"{what} has the unknown type {kind}") from None


def _scalars(header: _Header, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
    dtype = np.dtype(_SCALARS[kind])
    raw = header.take(count * dtype.itemsize, what)
    if kind == GGUFValueType.BOOL:
        return np.frombuffer(raw, np.uint8) != 0
    return np.frombuffer(raw, dtype)


def _tensor_info(header: _Header) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, row-major shape, type, and offset from the start of the data."""
    name = header.string("a tensor name", MAX_KEY_BYTES)
    dimensions = header.number("I", f"the shape of {name!r}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise header.fail(f"tensor {name!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    sizes = struct.unpack(f"<{dimensions}Q", header.take(8 * dimensions, f"the shape of {name!r}"))
    number = header.number("I", f"the type of {name!r}")
    offset = header.number("Q", f"the offset of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise header.fail(
            f"tensor {name!r} has the type {number}, which the installed gguf package does not know"
        ) from None
    return name, sizes[::-1], kind, offset


def _place(
    header: _Header,
    infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
    start: int,
    alignment: int,
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in tensors:
            raise header.fail(f"the tensor {name!r} occurs twice")
        if 0 in shape or shape[-1] % block:
            raise header.fail(f"tensor {name!r} has the shape {shape}, impossible for type {kind.name}")
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment or start + offset + nbytes > header.size:
            raise header.fail(
                f"tensor {name!r} ({nbytes:,} bytes at offset {offset:,}) does not fit the file: "
                "it is truncated or its header is wrong"
            )
        tensors[name] = GgufTensor(name, shape, kind, start + offset, nbytes)
    # tensors that share bytes would let a small file unfold into a huge model
    order = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in pairwise(order):
        if before.offset + before.nbytes > after.offset:
            raise header.fail(f"the tensors {before.name!r} and {after.name!r} overlap")
    return tensors
