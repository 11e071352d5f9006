"""What the machine at hand reaches: real training passes are timed, and the planner's rates fitted to
them."""

import itertools
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from ropewalk.data import Batch
from ropewalk.errors import UserError
from ropewalk.ops import QUANTIZED, QuantizedTensor
from ropewalk.ops.quantized import dense
from ropewalk.plan.calibration import NEVER, Calibration, Rates, features, fit_rates, least_costs, probes
from ropewalk.plan.hardware import cpu_kind
from ropewalk.plan.here import gpu
from ropewalk.plan.step_time import STATE_BYTES, trained_here
from ropewalk.plan.trace import model_of
from ropewalk.plan.work import Work
from ropewalk.train.objective import loss_sum
from ropewalk.train.optim import Optimizer, OptimizerConfig

PATIENCE, FEWEST = 15.0, 6
"""Seconds for which the shapes are tried in turn in a precision, and how many of them in any case: what
disturbs one turn may be gone in the next, and half a minute is what a user was promised."""
LARGEST = 1 << 28
"""Bytes that are written to find out how fast the disk is."""


def calibrate(
    device: torch.device, say: Callable[[str], None] = lambda text: None, patience: float = PATIENCE
) -> Calibration:
    """Passes on `device`, for `patience` seconds in each precision. Not saved; see `Calibration.save`."""
    rates = {}
    for precision in ("bfloat16", "float32"):
        if device.type == "cuda" and precision not in gpu().peak:
            continue
        say(f"training passes in {precision}")
        rates[precision] = _rates(device, precision, patience)
    say("writing to the disk")
    return Calibration(
        socket.gethostname(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_kind(),
        torch.get_num_threads(),
        torch.__version__,
        rates,
        _disk(),
        _collective(device),
    )


def _rates(device: torch.device, precision: str, patience: float) -> Rates:
    fastest: dict[Work, tuple[float, float]] = {}
    began = time.perf_counter()
    for tried, work in enumerate(itertools.cycle(probes(device.type, precision))):
        if time.perf_counter() - began > patience and tried >= FEWEST:
            break
        try:
            passes, update = measured_step(work, device)
        except torch.OutOfMemoryError:  # a small GPU: the others will do
            continue
        before = fastest.get(work, (passes, update))
        fastest[work] = min(before[0], passes), min(before[1], update)
    table, least = np.array([features(work) for work in fastest]), np.zeros(4)
    if len(table) < len(least):  # fewer shapes than what is to be found out
        raise UserError(f"{device}: too little of its memory is free for it to be measured")
    seconds = [passes for passes, _ in fastest.values()]
    updates = [updated_bytes(work) / update for work, (_, update) in fastest.items() if work.method == "full"]
    if device.type == "cuda":
        table[:, 3] = 0.0  # launches go on beside the kernels
        least = least_costs(gpu(), precision)
    (per_flop, per_byte, on_top, launch), error = fit_rates(table, np.array(seconds), least)
    tiny = 1 / NEVER
    return Rates(
        products=float(1 / max(per_flop, tiny)),
        memory=float(1 / max(per_byte, tiny)),
        attention=float(1 / max(per_flop + on_top, tiny)),
        launch=float(launch),
        update=statistics.median(updates),
        error=error,
        unpack={kind: _unpacked(form, device, precision) for kind, form in QUANTIZED.items()},
    )


def _unpacked(form: type[QuantizedTensor], device: torch.device, precision: str) -> float:
    """Numbers/s that are dequantized of a matrix in this form, into the buffer that all share."""
    weight = form.quantize(torch.randn(2048, 4096, dtype=getattr(torch, precision), device=device))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        dense(weight)
        _wait(device)
        times.append(time.perf_counter() - began)
    return weight.numel() / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def updated_bytes(work: Work) -> float:
    """What the time model says that an update of this work reads and writes."""
    return trained_here(work) * STATE_BYTES[work.optimizer]


def measured_step(work: Work, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and of an update: each the fastest of a few real steps, since
    what else the machine does only adds to them.

    On random weights and tokens, in one process; what `work` says of sharing is not looked at.
    """
    torch.manual_seed(0)
    model = model_of(work, device).to(device)
    optimizer = Optimizer(model, OptimizerConfig())
    tokens = torch.randint(0, work.config.vocab_size, (work.micro_batch_size, work.sequence_length))
    positions = torch.arange(work.sequence_length).expand(work.micro_batch_size, -1)
    batch = Batch(tokens, tokens.roll(-1, 1), positions, torch.zeros_like(tokens))

    passes: list[float] = []
    updates: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        (loss_sum(model, batch, work.loss_chunk) / tokens.numel()).backward()
        _wait(device)
        middle = time.perf_counter()
        optimizer.gradient_norm()
        optimizer.step(1e-5)
        _wait(device)
        passes.append(middle - start)
        updates.append(time.perf_counter() - middle)
    return min(passes[1:]), min(updates[1:])


def _disk() -> float:
    """Bytes/s of a file written to the current folder and synchronized."""
    data = os.urandom(1 << 22)
    with tempfile.NamedTemporaryFile(dir=".", prefix=".ropewalk-") as file:
        began = time.perf_counter()
        for _ in range(LARGEST // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return LARGEST / (time.perf_counter() - began)


def _collective(device: torch.device) -> tuple[int, float, float] | None:
    """Latency and seconds for a byte of an all-reduce's ring, over the processes that torchrun has
    started."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    p = dist.get_world_size()

    def clocked(count: int) -> float:
        values = torch.ones(count, device=device)
        times = []
        for _ in range(5):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            _wait(device)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    small, large = clocked(256), clocked(1 << 22)
    return p, small / (2 * (p - 1)), large * p / (2 * (p - 1) * 4 * (1 << 22))
