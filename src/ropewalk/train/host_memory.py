"""The host's memory: how the C library hands it out in training on a CPU, and what a GPU copies to."""

import ctypes
import os
import platform
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 16 << 20


def give_back_large_blocks() -> None:
    """Tensors of 16 MiB and more get pages of their own from now on, given back when they are freed.

    glibc learns from blocks that are freed: after a few large ones, whatever is smaller than 32 MiB comes
    from one heap. There the block inputs that a long row keeps come to lie between what was freed, and a gap
    that the next tensor does not fit into is lost: a row of 16,384 tokens took 2.6 GB instead of 1.6 (16
    layers of SmolLM2-135M's shape). Fresh pages cost time, which large tensors do not notice (at 4 MiB a step
    takes 10% longer). Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE)  # what glibc would have come to; fixing the one unfixes the other


def pinned(size: int) -> Tensor:
    """`size` bytes that a GPU copies to and from by itself: uint8 `[size]`.

    torch's own allocator rounds up to a power of two: 92 GB of block inputs would take 137. It waits for
    copies before it gives memory out again; here the caller sees to that. RopewalkError where there is none.
    """
    room = torch.empty(size, dtype=torch.uint8)
    runtime, address = torch.cuda.cudart(), room.data_ptr()
    if int(runtime.cudaHostRegister(address, size, 0)):
        raise RopewalkError(f"the host cannot pin {size / 1e9:.1f} GB more memory for what the GPU offloads")

    def release() -> None:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(address)

    weakref.finalize(room, release).atexit = False
    return room


def free_memory() -> int:
    """Bytes that processes here can still have: of the machine, or of the container's limit (cgroup v2)."""
    sizes = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(sizes["MemAvailable:"]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - int(used["anon"]) - int(used.get("kernel", 0)))
    except (OSError, ValueError, KeyError):
        return free


class HostCopies:
    """Room for one copy of a training state on the host, kept from one checkpoint to the next."""

    ALIGNED = 64

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Where their copies go, for `fill`; valid until the next call. None where half of the free memory,
        shared among the processes of this machine, is too little."""
        starts, size = {}, 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // self.ALIGNED) * self.ALIGNED
        if self._room is None or len(self._room) != size:
            self._room = None  # never two of them
            if size > free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
                return None
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._room = pinned(size) if on_gpu else torch.empty(size, dtype=torch.uint8)
        raw = {name: self._room[starts[name] : starts[name] + t.nbytes] for name, t in tensors.items()}
        return {name: raw[name].view(t.dtype).view(t.shape) for name, t in tensors.items()}


def fill(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` to the host; complete on return."""
    for name, tensor in tensors.items():
        if tensor.is_cuda or not tensor.is_contiguous():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        else:  # torch's copy spreads each tensor over threads: ten times as slow where cores are busy
            ctypes.memmove(copies[name].data_ptr(), tensor.data_ptr(), tensor.nbytes)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
