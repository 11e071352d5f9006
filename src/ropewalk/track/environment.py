"""Where a run happened: versions, machine, thread settings. Nothing here imports what it names."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ropewalk", "torch", "numpy", "transformers", "tokenizers", "safetensors", "pyarrow", "triton")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "LD_PRELOAD")


def environment(**facts: Any) -> dict[str, Any]:
    """JSON-able description of this process; `facts` (threads, device, ...) are added by who knows them."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **facts,
    }


def versions(whole: bool = True) -> dict[str, str]:
    """What must be the same in all processes of a run: python, packages, the code's commit if `whole`."""
    found = {"python": sys.version.split()[0]}
    found |= {name: version for name in PACKAGES if (version := installed(name))}
    commit = git_commit(Path(__file__).parent) if whole else None
    return found | ({"ropewalk's git commit": commit} if commit else {})


def git_commit(folder: str | Path = ".") -> str | None:
    """The commit checked out in `folder`, with `+changes` where files differ from it; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: str | Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def installed(name: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
