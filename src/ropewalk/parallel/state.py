"""Tensors of a training state on disk: each process writes its parts, any number of processes reads them.

A file for each process, safetensors (nothing is unpickled), whose metadata says where in the whole tensors
its parts begin, as torch.distributed.checkpoint writes and reads them (`HuggingFaceStorageReader`). Own code,
because that one's saving makes the processes agree by collectives, which a thread beside the training must
not, and copies every tensor on the way. Here each process knows alone what it has to write.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.model.safetensors_file import NAMES, write_safetensors
from ropewalk.parallel.places import first_with
from ropewalk.parallel.slices import sliced_along
from ropewalk.parallel.world import World

WHOLE = "tensors.safetensors"
OFFSETS = "DCP_SHARDING_INFO"
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Part:
    """What a process has of a tensor: its numbers from `start` on, of a whole of `shape`."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    writes: bool = True
    """False: another process has the same, and writes it"""


def part_of(name: str, parameter: Tensor, world: World) -> Part:
    """What this process has of a parameter."""
    from torch.distributed.tensor import DTensor

    shape, size = tuple(parameter.shape), tuple(parameter.shape)
    if world.mesh is None:
        return Part((0,) * len(shape), shape, shape)
    start = [0] * len(shape)
    if isinstance(parameter, DTensor):
        (chunk,) = parameter.__create_chunk_list__()
        start, size = list(chunk.offsets), tuple(chunk.sizes)
    sliced = sliced_along(name) if world.layout.tensor > 1 else None
    if sliced is not None:  # what is here is (of) a slice
        start[sliced] += shape[sliced] * world.index("tensor")
        shape = tuple(n * world.layout.tensor if i == sliced else n for i, n in enumerate(shape))
    return Part(tuple(start), size, shape, first_with(name, world))


def parts_of(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], world: World
) -> dict[str, Part]:
    """Which part each tensor is. Those called KIND.NAME after a parameter NAME are as that is, if they have
    its shape; else (a count of updates) all processes that have it have the same, and the first of those
    writes it. What is called after no parameter is its process's own, and whole."""
    parts = {}
    for name, tensor in tensors.items():
        size, key = tuple(tensor.shape), name.partition(".")[2]
        writes = key not in parameters or first_with(key, world, whole=True)
        parts[name] = Part((0,) * len(size), size, size, writes)
        if key in parameters and size == (part := part_of(key, parameters[key], world)).size and size:
            parts[name] = part
    return parts


def part_file(world: World) -> str:
    """The name of this process's file."""
    return WHOLE if world.size == 1 else f"tensors-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"


def write_parts(path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
    """Writes what is this process's to write, one tensor after the other."""
    wanted = [name for name in tensors if parts[name].writes and 0 not in parts[name].size]
    wanted.sort(key=lambda name: -tensors[name].element_size())  # so that each begins at a multiple of it
    entries = [(name, NAMES[tensors[name].dtype], parts[name].size) for name in wanted]
    offsets = {name: {"saved_offsets": parts[name].start} for name in wanted}
    write_safetensors(path, entries, (tensors[name] for name in wanted), {OFFSETS: json.dumps(offsets)})


class Stored:
    """`with Stored(folder) as stored:` its tensors, put together from the parts that `write_parts` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._parts: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._files.enter_context(safe_open(path, framework="pt"))  # nothing is read yet
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                size = tuple(file.get_slice(name).get_shape())
                start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(size)
                self._parts.setdefault(name, []).append((file, start, size))

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._parts.clear()

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ends = [[a + n for a, n in zip(start, size, strict=True)] for _, start, size in self._parts[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or a part of it. RopewalkError where nobody has written all of that."""
        pieces, shape = self._parts[name], self.shape(name)
        begin, size = (part.start, part.size) if part is not None else ((0,) * len(shape), shape)
        if pieces[0][1:] == (begin, size):
            return cast(Tensor, pieces[0][0].get_tensor(name))
        result = torch.empty(size, dtype=DTYPES[pieces[0][0].get_slice(name).get_dtype()])
        filled: dict[tuple[int, ...], int] = {}
        for file, start, length in pieces:
            low = tuple(map(max, start, begin))
            high = tuple(min(s + n, b + m) for s, n, b, m in zip(start, length, begin, size, strict=True))
            if low in filled or any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            values = file.get_slice(name)[_box(low, high, start)]
            result[_box(low, high, begin)] = values
            filled[low] = values.numel()
        if sum(filled.values()) != result.numel():
            raise RopewalkError(f"{self.folder}: a part of {name} is missing")
        return result


def load_tensors(
    folder: Path, parameters: Mapping[str, Tensor], world: World, elsewhere: Collection[str] = ()
) -> dict[str, Tensor]:
    """What `write_parts` wrote, whoever wrote it: of divided parameters the parts for this process, of those
    that are `elsewhere` nothing."""
    found = {}
    with Stored(folder) as stored:
        for name in stored.names():
            key = name.partition(".")[2]
            if key in elsewhere:
                continue
            part = part_of(key, parameters[key], world) if key in parameters else None
            found[name] = stored.read(name, part if part and part.shape == stored.shape(name) else None)
    return found


def _box(low: tuple[int, ...], high: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
