"""The kernels for CPUs that are written in C++ (`cpu/`): compiled at first use for the processor at hand.

They take seconds to compile and are kept in the cache. Their threads are torch's, which has loaded OpenMP
before and made its names known to all libraries. Without a compiler, or where it fails, everything goes
through torch's own kernels; `unavailable` says why. (Those for GPUs are in Triton: `on_gpu`.)
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_file, cache_directory

_OPTIONS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math".split()
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float"}


def takes(x: Tensor) -> bool:
    """Whether there are kernels for tensors such as this one. Not in compiled code, which has its own."""
    known = x.device.type == "cpu" and x.dtype in _NAMES
    return known and not torch.compiler.is_compiling() and library() is not None


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels take it: what is on a GPU, but for float64."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def run(name: str, *arguments: Any) -> Any:
    """Calls a kernel. Tensors are given by address, contiguous ones; torch's number of threads comes last."""
    kernels = library()
    assert kernels is not None
    return getattr(kernels, name)(*map(_converted, arguments), torch.get_num_threads())


def run_on(x: Tensor, name: str, *arguments: Any) -> None:
    """`run`, of the kernel for numbers of x's type, whose first argument x is."""
    run(f"{name}_{_NAMES[x.dtype]}", x, *arguments)


def _converted(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    types = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}
    return types[type(value)](value) if type(value) in types else value


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    return _found()[0]


def unavailable() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    return _found()[1]


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, "they are written for Linux on x86-64"
    if shutil.which(compiler[0]) is None:
        return None, f"there is no C++ compiler ({compiler[0]})"
    try:
        return ctypes.CDLL(str(_compiled(compiler))), None
    except (OSError, RopewalkError) as error:
        return None, str(error)


def _compiled(compiler: list[str]) -> Path:
    """Where the library lies, named after all that it depends on: machines may share the cache."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    files = sorted((Path(__file__).parent / "cpu").glob("*.[ch]*"))
    known = [flags, *compiler, *_OPTIONS, *(file.read_text() for file in files)]
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    path = cache_directory() / "kernels" / f"{name}.so"
    if not path.exists():
        with atomic_file(path) as temporary:
            command = [*compiler, *_OPTIONS, "-fopenmp", "-shared", "-fPIC", "-o", str(temporary)]
            sources = [str(file) for file in files if file.suffix == ".cpp"]
            done = subprocess.run([*command, *sources], capture_output=True, text=True)
            if done.returncode:
                raise RopewalkError(f"{compiler[0]} failed: {done.stderr.strip()[:500]}")
    return path
