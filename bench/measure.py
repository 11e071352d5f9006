"""What every benchmark here needs: commands in their own processes, measured, in turn, and written down.

A measured command prints one line `RESULT {json}`; its peak memory is taken from outside, so that all tools
are measured alike. Only the standard library.
"""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARK = "RESULT "
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Measurement:
    """One run of one side."""

    side: str
    seconds: float
    """wall time of the whole process"""
    processor_seconds: float
    """time all threads computed (or waited for each other in a loop)"""
    peak_bytes: int
    """most resident memory of the process and its children together"""
    load_before: float
    """load average of the machine just before: above about 0.5 it was not quiet"""
    result: dict[str, Any]
    """what the command printed"""


def measure(
    side: str,
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    timeout: float = 3600.0,
) -> Measurement:
    """Runs `command` and waits for it. Raises RuntimeError with the end of its output when it fails.

    Peak memory is the larger of the kernel's high-water mark of the process and the largest sum over the
    process tree, seen in samples (20 a second). (Not `ru_maxrss`: a child's starts with its parent's.)
    """
    load = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=output.extend, args=(process.stdout,), daemon=True)
    reader.start()
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _tree_bytes(process.pid), _high_water_bytes(process.pid))
        if time.perf_counter() - start > timeout:
            os.killpg(process.pid, 9)
            timeout = float("inf")
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join(5)
    lines = [line for line in output if line.startswith(MARK)]
    if process.returncode or not lines:
        raise RuntimeError(f"{side} ended with {process.returncode}:\n{''.join(output)[-4000:]}")
    return Measurement(
        side,
        seconds,
        usage.ru_utime + usage.ru_stime,
        peak,
        load,
        json.loads(lines[-1][len(MARK) :]),
    )


def interleave(runs: int, sides: Mapping[str, Callable[[], Measurement]]) -> list[Measurement]:
    """Every side once, `runs` times over: what disturbs the machine disturbs all of them."""
    done = []
    for repeat in range(runs):
        for name, run in sides.items():
            print(f"run {repeat + 1} of {runs}: {name} ...", flush=True)
            done.append(run())
    return done


def median(measurements: Sequence[Measurement], side: str, value: Callable[[Measurement], float]) -> float:
    """The median of a value over the runs of one side."""
    return statistics.median(value(m) for m in measurements if m.side == side)


def write_results(
    path: Path, measurements: Sequence[Measurement], settings: Mapping[str, Any], summary: Any
) -> None:
    """Everything as JSON, with the machine's description."""
    content = {
        "machine": machine(),
        "settings": settings,
        "summary": summary,
        "runs": [asdict(m) for m in measurements],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(content), encoding="utf-8")


def as_json(content: Any) -> str:
    """JSON for bench/results/, without the places of one machine (its home, its temporary files)."""
    text = json.dumps(content, indent=1)
    for place, name in ((tempfile.gettempdir(), "TMP"), (str(Path.home()), "~")):
        text = text.replace(f'"{place}/', f'"{name}/')
    return text + "\n"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; no names of hosts or users."""
    about = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.machine(),
        "features": [name for name in ("avx2", "avx512_bf16", "amx_bf16", "amx_int8") if name in about],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * PAGE,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _high_water_bytes(pid: int) -> int:
    """The most resident memory a process has had since it began its program; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _tree_bytes(root: int) -> int:
    """Resident memory of a process and all its descendants; pages they share count for each."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting.extend(int(child) for child in (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue  # it has just ended
    return total
