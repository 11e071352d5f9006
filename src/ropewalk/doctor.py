"""What this machine can really do: every line is the outcome of a launch, not of a version check.

In: nothing. Out: a `Report` of devices, types, attention kernels, compilation, versions, and advice.
May import: torch, `recipe` (for the machine's facts), `track` (for versions). Takes seconds.
"""

import contextlib
import importlib.metadata
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropewalk import make_callable
from ropewalk.ops.native import unavailable
from ropewalk.ops.product import product
from ropewalk.recipe.machine import Machine
from ropewalk.track import environment
from ropewalk.track.environment import installed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest error against float64, relative to the result's own size."""
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Launch:
    """One operation in one type on one device. `error` is relative to a float64 result; failed: `reason`."""

    operation: str
    dtype: str
    ok: bool
    milliseconds: float | None = None
    error: float | None = None
    gflops: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Device:
    """A place to compute on. Bytes of memory; launches in the order in which they were made."""

    name: str
    model: str
    memory_total: int
    memory_free: int
    launches: list[Launch]
    attention: list[Launch]
    """Scaled dot product attention, forward and backward, each kernel forced in turn."""
    compiles: Launch
    recommended_precision: str


@dataclass(frozen=True)
class Package:
    """An installed library beside the version that Ropewalk was tested with."""

    name: str
    installed: str | None
    tested: str | None


@dataclass(frozen=True)
class Report:
    """All that `ropewalk doctor` says."""

    environment: dict[str, Any]
    threads: int
    disk_free: dict[str, int]
    """Bytes free in the current folder and in the temporary one."""
    packages: list[Package]
    devices: list[Device]
    advice: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether training in float32 can work on at least one device."""
        return any(
            all(launch.ok for launch in device.launches if launch.dtype == "float32")
            for device in self.devices
        )


def doctor() -> Report:
    """Launch small computations in every type on every device and report what came of them."""
    names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = environment()
    report = Report(
        environment=here,
        threads=torch.get_num_threads(),
        disk_free={
            "here": shutil.disk_usage(".").free,
            "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
        },
        packages=_packages(),
        devices=[_device(name, here) for name in names],
    )
    report.advice.extend(_advice(report))
    return report


# --- devices ---------------------------------------------------------------------------------


def _device(name: str, here: dict[str, Any]) -> Device:
    if name == "cpu":
        model, total = here["cpu"], here["memory_bytes"]
        free = _memory_free(total)
    else:
        model = torch.cuda.get_device_name(name)
        free, total = torch.cuda.mem_get_info(name)
    launches = [
        launch for dtype in DTYPES for launch in (_matmul(name, dtype), _attention(name, dtype, None))
    ]
    kernels = [_attention(name, dtype, kernel) for kernel in KERNELS for dtype in ("float32", "bfloat16")]
    speed = {launch.dtype: launch.gflops or 0.0 for launch in launches if launch.operation == "matmul"}
    right = all(launch.ok for launch in launches if launch.dtype == "bfloat16")
    return Device(
        name=name,
        model=model,
        memory_total=total,
        memory_free=free,
        launches=launches,
        attention=kernels,
        compiles=_compile(name),
        # a little slower is worth half the memory
        recommended_precision="bfloat16"
        if right and speed["bfloat16"] > 0.7 * speed["float32"]
        else "float32",
    )


def _memory_free(total: int) -> int:
    """Available bytes of main memory; `total` where nothing says so."""
    try:
        (kilobytes,) = re.findall(
            r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):
        return total
    return int(kilobytes) * 1024


def _launched(
    operation: str, dtype: str, device: str, run: Callable[[], list[torch.Tensor]], exact: list[torch.Tensor]
) -> Launch:
    """Run once to set up, take the best time of three more, and compare with the float64 result."""
    try:
        run()
        seconds = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            results = run()
            if device != "cpu":
                torch.cuda.synchronize(device)
            seconds = min(seconds, time.perf_counter() - start)
    except Exception as error:  # whatever a kernel throws is the finding
        return Launch(
            operation, dtype, False, reason=str(error).strip().partition("\n")[0].partition(". ")[0]
        )
    worst = max(
        float((got.double().cpu() - want).abs().max() / want.abs().max())
        for got, want in zip(results, exact, strict=True)
    )
    ok = worst <= TOLERANCE[dtype]  # False for NaN too
    reason = "" if ok else f"wrong result: off by {worst:.1e} of its size"
    return Launch(operation, dtype, ok, 1000 * seconds, worst, reason=reason)


def _matmul(device: str, dtype: str, size: int = 1024) -> Launch:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    exact = (a[:64].double() @ b.double()) if device == "cpu" else a.double() @ b.double()
    left, right = a.to(device), b.to(device)
    launch = _launched("matmul", dtype, device, lambda: [product(left, right)[: len(exact)]], [exact])
    if launch.milliseconds is None:
        return launch
    return replace(launch, gflops=2 * size**3 / launch.milliseconds / 1e6)


def _attention(device: str, dtype: str, kernel: str | None) -> Launch:
    """Causal attention, forward and backward: with the kernel that torch chooses, or with one forced."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 4, 128, 64, generator=generator).to(DTYPES[dtype]) for _ in range(3)]
    weight = torch.randn(1, 4, 128, 64, generator=generator).to(DTYPES[dtype])

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        q, k, v = (t.detach().requires_grad_() for t in tensors)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), weight.to(out))]

    with sdpa_kernel([SDPBackend.MATH]):
        exact = [t.cpu() for t in run([t.double() for t in inputs])]
    moved = [t.to(device) for t in inputs]
    with warnings.catch_warnings(), sdpa_kernel([KERNELS[kernel]]) if kernel else contextlib.nullcontext():
        warnings.simplefilter("ignore")  # a refused kernel says why in a dozen warnings
        return _launched(kernel or "attention", dtype, device, lambda: run(moved), exact)


def _compile(device: str) -> Launch:
    """Compile a small function that was never compiled before: no cache holds its constant."""
    x, constant = torch.linspace(-3, 3, 256), time.time() % 1
    exact = x.double().sigmoid() * x.double() + constant
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.compile(lambda t: t.sigmoid() * t + constant)
        launch = _launched("compile", "float32", device, lambda: [function(x.to(device))], [exact])
    torch.compiler.reset()
    if launch.milliseconds is None:
        return launch
    return replace(launch, milliseconds=1000 * (time.perf_counter() - start))


# --- versions and advice ---------------------------------------------------------------------


def _packages() -> list[Package]:
    """Each direct dependency, with its version in constraints.txt where that file is in reach."""
    tested = {}
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "constraints.txt").is_file():
            text = (folder / "constraints.txt").read_text()
            tested = {_plain(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
            break
    try:
        lines = importlib.metadata.requires("ropewalk") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line] or sorted(tested)
    return [Package(name, installed(name), tested.get(_plain(name))) for name in names]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _advice(report: Report) -> Iterator[str]:
    for device in report.devices:
        for launch in device.launches:
            if not launch.ok and launch.dtype != "float16":
                yield f"{device.name}: {launch.operation} in {launch.dtype} does not work: {launch.reason}"
        if not device.compiles.ok:
            need = "a C++ compiler (g++) and Python's headers" if device.name == "cpu" else "triton"
            yield f"{device.name}: torch.compile does not work (it needs {need}); leave train.compile off"
    if reason := unavailable():
        yield f"cpu: torch's kernels do what Ropewalk's own would do faster: {reason}"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield "the NVIDIA driver is here, but this torch cannot use it: install a CUDA build of torch"
    claimed = Machine.here()
    cpu = report.devices[0]
    if claimed.cpu_bfloat16 != (cpu.recommended_precision == "bfloat16"):
        yield (
            f"train.precision auto says {'bfloat16' if claimed.cpu_bfloat16 else 'float32'} for this CPU, "
            f"but {cpu.recommended_precision} was faster just now"
        )
    for package in report.packages:
        if package.installed is None:
            yield f"{package.name} is not installed: pip install -e . -c constraints.txt"
        elif package.tested and package.installed.partition("+")[0] != package.tested:
            yield f"{package.name} {package.installed} is installed; {package.tested} is what was tested"
    if cpu.memory_free < 4 * 2**30:
        yield f"only {cpu.memory_free / 2**30:.1f} GiB of memory are free"
    if report.disk_free["here"] < 5 * 2**30:
        yield f"only {report.disk_free['here'] / 2**30:.1f} GiB of disk are free here"
    if report.threads < report.environment["cores"]:
        yield f"torch uses {report.threads} of {report.environment['cores']} cores (is OMP_NUM_THREADS set?)"


make_callable(__name__)
