"""Tensors of a training state on disk: each process writes its parts, any number of processes reads them.

A file for each process, safetensors (nothing is unpickled), whose metadata says where in the whole tensors
its parts begin, as torch.distributed.checkpoint writes and reads them (`HuggingFaceStorageReader`). Own code,
because that one's saving makes the processes agree by collectives, which a thread beside the training must
not, and copies every tensor on the way. Here each process knows alone what it has to write.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.model.safetensors_file import NAMES, write_safetensors
from ropewalk.parallel.world import World

WHOLE = "tensors.safetensors"
OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """What a process has of a tensor: its numbers from `start` on, of a whole of `shape`."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    writes: bool = True
    """False: another process has the same, and writes it"""


def part_of(parameter: Tensor) -> Part:
    """What this process has of a parameter."""
    from torch.distributed.tensor import DTensor

    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Part((0,) * len(shape), shape, shape)
    (chunk,) = parameter.__create_chunk_list__()
    place = parameter.device_mesh.get_coordinate()
    assert place is not None
    first = not any(at for at, kind in zip(place, parameter.placements, strict=True) if kind.is_replicate())
    return Part(tuple(chunk.offsets), tuple(chunk.sizes), shape, first)


def parts_of(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Part]:
    """Of tensors called KIND.NAME after a parameter NAME, of its shape: its parts. Others are whole; those of
    a parameter that several processes share are written by the first of them."""
    parts = {}
    for name, tensor in tensors.items():
        whole = Part((0,) * tensor.ndim, tuple(tensor.shape), tuple(tensor.shape))
        parameter = parameters.get(name.partition(".")[2])
        part = part_of(parameter) if parameter is not None else whole
        if parameter is not None and (part.size != whole.size or not part.size):
            mesh = getattr(parameter, "device_mesh", None)  # a count of updates, or a state in few bits
            part = Part(whole.start, whole.size, whole.shape, mesh is None or not any(mesh.get_coordinate()))
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
    """The tensors of a folder, put together from the parts that `write_parts` wrote."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")  # maps it; nothing is read yet
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                size = tuple(file.get_slice(name).get_shape())
                start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(size)
                self._parts.setdefault(name, []).append((file, start, size))

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ends = [[a + n for a, n in zip(start, size, strict=True)] for _, start, size in self._parts[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or a part of it. RopewalkError where nobody has written all of that."""
        pieces = self._parts[name]
        shape = self.shape(name)
        begin, size = (part.start, part.size) if part is not None else ((0,) * len(shape), shape)
        if len(pieces) == 1 and pieces[0][1:] == (begin, size):
            return pieces[0][0].get_tensor(name)
        result: Tensor | None = None
        filled: set[tuple[int, ...]] = set()
        for file, start, length in pieces:
            low = tuple(map(max, start, begin))
            high = tuple(min(s + n, b + m) for s, n, b, m in zip(start, length, begin, size, strict=True))
            if low in filled or any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            values = file.get_slice(name)[there] if there else file.get_tensor(name)
            if result is None:
                result = torch.empty(size, dtype=values.dtype)
            result[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, begin, strict=True))] = values
            filled.add(low)
        ...
