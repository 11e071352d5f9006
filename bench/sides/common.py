"""What every side of a benchmark shares: its job, a clock for its steps, and the line in which it reports.

Runs in each peer's own environment: nothing but the standard library and torch.
"""

import importlib.metadata
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def read_job() -> dict[str, Any]:
    """The job, a JSON file that is the program's only argument; the device it names is made ready."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    return job


class Clock:
    """The times at which steps end. A step holds all that happens in it: data, computation, logging."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def tick(self) -> None:
        """Called before the first step and after each."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.ends)]


def examples(path: str) -> list[dict[str, list[int]]]:
    """The tokens of the work: each document's `tokens`, and `labels` not yet shifted (-100: not scored)."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def report(job: dict[str, Any], packages: tuple[str, ...], **values: Any) -> None:
    """Prints the result line; on a GPU with the most memory that torch had allocated at once."""
    values["versions"] = {name: _version(name) for name in ("torch", *packages)}
    if job["device"] == "cuda":
        values["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        values["device_reserved_bytes"] = torch.cuda.max_memory_reserved()
        values["device_name"] = torch.cuda.get_device_name()
    print("RESULT " + json.dumps(values), flush=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
