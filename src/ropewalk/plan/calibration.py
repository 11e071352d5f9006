"""What a machine reaches: the time model's rates, fitted to training passes that were timed there.

The seconds of a step are linear in what products, memory, attention and launches take (`kernels`). So a few
passes of different shapes (wide and narrow, short rows and long, full and LoRA) say all four at once, with
whatever this machine, this torch and this project's operations make of them. What is left over is reported.
"""

import itertools
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.files import atomic_write, cache_directory
from ropewalk.model.config import ModelConfig
from ropewalk.plan.hardware import Accelerator, Cluster
from ropewalk.plan.step_time import step_time
from ropewalk.plan.work import Work

NEVER = 1e30
"""A rate at which something takes no time."""
NEAR = 1.2
"""Times the least error: fits that are as good."""


@dataclass(frozen=True)
class Rates:
    """Of one precision: FLOP/s and bytes/s that real passes reach, seconds of a launch."""

    products: float
    memory: float
    attention: float
    launch: float
    update: float
    """bytes/s of the optimizer"""
    error: float
    """mean difference of the fitted passes, relative"""
    unpack: dict[str, float] = field(default_factory=dict)
    """numbers/s that are dequantized, by kind"""


@dataclass(frozen=True)
class Calibration:
    """What was measured on one machine. Bytes/s, seconds."""

    host: str
    device: str
    threads: int
    torch: str
    rates: dict[str, Rates]
    disk: float
    collective: tuple[int, float, float] | None = None
    """processes, latency, seconds for a byte"""
    corrections: dict[str, float] = field(default_factory=dict)
    """measured over predicted seconds of the runs since, by precision; their running mean"""

    def save(self) -> Path:
        path = calibration_file(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(asdict(self), indent=2) + "\n")
        return path


def calibration_file(device: str) -> Path:
    """Where a machine's calibration is kept; one for each host and kind of device."""
    name = "".join(c if c.isalnum() else "-" for c in f"{socket.gethostname()}-{device}".lower())
    return cache_directory() / "calibration" / f"{name}.json"


def calibration(device: str) -> Calibration | None:
    """What was measured here before; None where nothing was, or where it cannot be read."""
    try:
        said = json.loads(calibration_file(device).read_text(encoding="utf-8"))
        rates = {name: Rates(**values) for name, values in said.pop("rates").items()}
        wire = said.pop("collective")
        return Calibration(**said, rates=rates, collective=tuple(wire) if wire else None)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def probes(device: str, precision: str) -> Iterator[Work]:
    """Shapes small enough for half a second each, and different in what they spend it on.

    On a GPU so large that it, and not the launching of kernels beside it, is what takes the time.
    """
    large = device == "cuda"
    kinds = ((1, 256, "full"), (1, 0, "full"), (2, 512, "lora"), (2, 512, "full"), (1, 1024, "lora"))
    sizes: tuple[tuple[int, ...], ...] = ((384, 1024, 6, 2, 8192), (768, 2048, 12, 4, 16384))
    if large:
        kinds = (
            (2, 2048, "full"),
            (1, 8192, "full"),
            (4, 2048, "lora"),
            (4, 1024, "full"),
            (1, 8192, "lora"),
        )
        sizes = ((3072, 8192, 24, 8, 32768), (4096, 14336, 32, 8, 32768))
    for (rows, sequence, method), (hidden, inner, heads, kv, vocabulary) in product(kinds, sizes):
        config = ModelConfig(
            family="llama",
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=hidden // heads,
            max_position_embeddings=16384,
        )
        yield Work(
            config,
            sequence_length=sequence or (3 << 19) // hidden,  # long rows, of the smaller one above all
            micro_batch_size=rows,
            precision=precision,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            device="cuda" if large else "cpu",
        )


def features(work: Work) -> list[float]:
    """What the time model counts in a pass: FLOPs, bytes, attention's FLOPs, launches. Attention's are among
    the first, too: it is no faster than products are, and what is fitted is by how much slower.
    """
    found = []
    for one in range(4):
        rates = [NEVER if i != one else 1.0 for i in range(4)]
        device = _bare(work.precision, rates[0], rates[1], rates[2], launch=1.0 if one == 3 else 0.0)
        phases = step_time(work, Cluster(device, 1, 1)).phases
        found.append(sum(value for name, value in phases.items() if name != "optimizer"))
    found[0] += found[2]
    return found


def _bare(precision: str, products: float, memory: float, attention: float, launch: float) -> Accelerator:
    return Accelerator(
        name="here",
        peak={precision: 1.0},
        memory=1.0,
        memory_bandwidth=memory,
        link=1.0,
        network=1.0,
        matmul=products,
        memory_share=1.0,
        attention=attention,
        attention_backward=attention,
        launch=launch,
        link_share=1.0,
        network_share=1.0,
        per_node=1,
        latency=0.0,
        network_latency=0.0,
        host=1.0,
        context=0.0,
    )


def least_costs(device: Accelerator, precision: str) -> np.ndarray:
    """Seconds of a FLOP and a byte at the peaks of the data sheet; of what attention adds, and a launch."""
    return np.array([1 / device.peak_of(precision), 1 / device.memory_bandwidth, 0.0, 0.0])


def fit_rates(table: np.ndarray, seconds: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares of relative errors with no coefficient below `least`, what the data sheet's rates allow.

    Of the subsets of columns that are nearly as good as the best, one with most is taken: what is left out
    would cost nothing on other shapes, too.
    """
    scaled = table / seconds[:, None]
    if ((rest := 1 - scaled @ least) < 0).any():  # faster than its data sheet: another device
        least, rest = np.zeros_like(least), np.ones(len(seconds))
    found = [(float(np.abs(rest).mean()), 0, least)]
    for size in range(1, table.shape[1] + 1):
        for columns in itertools.combinations(range(table.shape[1]), size):
            some, *_ = np.linalg.lstsq(scaled[:, columns], rest)
            if (some < 0).any():
                continue
            whole = least.copy()
            whole[list(columns)] += some
            found.append((float(np.abs(scaled @ whole - 1).mean()), size, whole))
    best = min(error for error, _, _ in found)
    error, _, whole = min((one for one in found if one[0] <= NEAR * best), key=lambda one: (-one[1], one[0]))
    return whole, error


def corrected(before: Calibration, precision: str, measured: float, predicted: float) -> Calibration:
    """With a run's seconds taken into account: a quarter of the way, and never more than threefold."""
    ratio = min(3.0, max(1 / 3, measured / predicted))
    old = before.corrections.get(precision, 1.0)
    changed: dict[str, Any] = {**before.corrections, precision: round(old * ratio**0.25, 4)}
    return replace(before, corrections=changed)
