"""What `auto` in a recipe needs to know of the machine, found without importing torch."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ropewalk.layout import told_by_launcher


@dataclass(frozen=True)
class Machine:
    """The facts that derived values of a recipe rest on."""

    cores: int
    """Processor cores that this process may use."""
    cpu_bfloat16: bool
    """The CPU multiplies bfloat16 itself: AMX, AVX512-BF16, or Arm's BF16."""
    gpu: bool = False
    """There is an NVIDIA GPU and the installed torch can use it."""
    gpu_bfloat16: bool = False
    """The GPU is of compute capability 8.0 (Ampere) or newer."""
    processes: int | None = None
    """How many torchrun, or a scheduler in its manner, has started; None where nobody did."""
    local_processes: int | None = None
    """How many of those are on this machine and share its cores; None where nobody says so."""

    @staticmethod
    @cache
    def here() -> "Machine":
        capability = _gpu_capability() if _torch_has_cuda() else None
        return Machine(
            cores=len(os.sched_getaffinity(0)),
            cpu_bfloat16=_cpu_has_bfloat16(),
            gpu=capability is not None,
            gpu_bfloat16=capability is not None and capability >= 8.0,
            processes=told_by_launcher("WORLD_SIZE"),
            local_processes=told_by_launcher("LOCAL_WORLD_SIZE"),
        )


def _cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    # `flags` on x86-64 (avx512_bf16: Cooper Lake, Zen 4; amx_bf16: Sapphire Rapids), `Features` on arm64.
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return bool(lines) and bool({"amx_bf16", "avx512_bf16", "bf16"} & set(lines[0].split()))


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda(?::[^=]*)? = '", text, re.MULTILINE) is not None


def _gpu_capability() -> float | None:
    """The lowest compute capability among the GPUs; None where there is none to be seen."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    numbers = re.findall(r"^\s*(\d+\.\d+)\s*$", said, re.MULTILINE)
    return min(map(float, numbers)) if numbers else None
