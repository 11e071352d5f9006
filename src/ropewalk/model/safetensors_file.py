"""The safetensors format (github.com/huggingface/safetensors), read and written in pieces.

The `safetensors` package maps whole files into memory, where every page that was read counts as used. To
load into another dtype with little more than the model itself in memory, tensors are read in
small pieces. Headers are untrusted: sizes are checked against the file before anything is allocated.
"""

import ctypes
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import UserError

MAX_HEADER_BYTES = 100_000_000
CHUNK_VALUES = 1 << 15
"""Values read at once: they stay in the cache, and torch does not spread so few over threads. On a busy
machine, thousands of short parallel loops that wait for each other take a hundred times as long."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls torch's types."""
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `[start, stop)` of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises UserError for a damaged or truncated one."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, "its header does not fit the file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy or download it again") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    # tensors that share bytes would let a small file unfold into a huge model
    order = sorted((t for t in tensors.values() if t.start < t.stop), key=lambda t: t.start)
    for before, after in pairwise(order):
        if before.stop > after.start:
            raise _damaged(path, f"the tensors {before.name!r} and {after.name!r} overlap")
    end = max((t.stop for t in tensors.values()), default=8 + length)
    if end > size:
        raise _damaged(path, f"it is truncated: {end - size:,} of {end:,} bytes are missing")
    return tensors


def _entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        well_formed = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        fits = well_formed and stop - start == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise _damaged(path, f"the header's entry for {name!r} makes no sense")
    return StoredTensor(path, name, dtype, shape, data + start, data + stop)


def read_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """The values of a floating-point tensor in order, flat, `CHUNK_VALUES` at a time.

    Every chunk is the same memory again: copy what is to stay.
    """
    dtype = FLOATS[tensor.dtype]
    size = min(CHUNK_VALUES * dtype.itemsize, tensor.stop - tensor.start)
    buffer = torch.empty(size, dtype=torch.uint8)
    view = buffer.numpy().data
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            count = min(left, len(view))
            fill(file, view[:count], tensor)
            yield buffer[:count].view(dtype)
            left -= count


def fill(file: Any, view: memoryview, tensor: StoredTensor) -> None:
    """Reads exactly `view`'s length (one read may return less, above 2 GiB always)."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _damaged(tensor.file, f"it ends within {tensor.name!r}")
        done += count


def write_safetensors(
    path: Path,
    entries: Sequence[tuple[str, str, Sequence[int]]],
    values: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes (name, dtype as in `NAMES`, shape) entries, with tensors made one after the other.

    Nothing is copied on the way: `safetensors.torch.save_file` makes bytes of all tensors before it writes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape in entries:
        stop = at + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(raw).to_bytes(8, "little") + raw))
        for (name, dtype, shape), tensor in zip(entries, values, strict=True):
            if tuple(tensor.shape) != tuple(shape) or NAMES[tensor.dtype] != dtype:
                raise ValueError(
                    f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not {tuple(shape)} {dtype}"
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.nbytes:  # not by numpy, which fixes the memory for good: what FSDP gathers is freed again
                _write_all(file, memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())))


def _write_all(file: Any, data: memoryview) -> None:
    """One write takes less than all of it above 2 GiB, and on a disk that is about to be full."""
    data = data.cast("B")
    while len(data):
        data = data[file.write(data) :]


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: not a usable safetensors file: {problem}; copy or download it again")
