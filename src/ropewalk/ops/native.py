"""The kernels for CPUs that are written in C++ (`cpu/`): compiled at first use for the processor at hand.

They take a second to compile and are kept in the cache. Their threads are torch's, which has loaded OpenMP
before and made its names known to all libraries. Without a compiler, or where it fails, everything goes
through torch's own kernels; `unavailable` says why.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_file, cache_directory

_SOURCES = tuple(sorted((Path(__file__).parent / "cpu").glob("*.cpp")))
_OPTIONS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math".split()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    return _found()[0]


def unavailable() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    return _found()[1]


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, "they are written for Linux on x86-64"
    if compiler is None:
        return None, "there is no C++ compiler (g++)"
    try:
        return ctypes.CDLL(str(_compiled(compiler))), None
    except (OSError, RopewalkError) as error:
        return None, str(error)


def _compiled(compiler: str) -> Path:
    """Where the library lies, named after all that it depends on: machines may share the cache."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    known = [flags, compiler, *_OPTIONS, *(source.read_text() for source in _SOURCES)]
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    path = cache_directory() / "kernels" / f"{name}.so"
    if not path.exists():
        with atomic_file(path) as temporary:
            command = [compiler, *_OPTIONS, "-fopenmp", "-shared", "-fPIC", "-o", str(temporary)]
            done = subprocess.run([*command, *map(str, _SOURCES)], capture_output=True, text=True)
            if done.returncode:
                raise RopewalkError(f"{compiler} failed: {done.stderr.strip()[:500]}")
    return path
