"""This machine as a cluster: its devices, their memory, and what was measured of them."""

import os
from dataclasses import replace

import torch

from ropewalk.errors import UserError
from ropewalk.plan.calibration import Calibration, calibration
from ropewalk.plan.hardware import Accelerator, Cluster, accelerator, cpu_kind, of_cores, precision_name
from ropewalk.recipe.machine import Machine
from ropewalk.train.host_memory import free_memory


def here(processes: int = 1, precision: str = "bfloat16", device: str = "auto") -> Cluster:
    """What there is for `processes`: its GPUs, or its cores, which they share. Calibrated where it was."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return _gpus(processes, precision)
    cores = max(1, Machine.here().cores // processes)
    made = replace(of_cores(accelerator(cpu_kind()), cores), memory=free_memory() / processes)
    made = calibrated(made, calibration(made.name), precision, cores)
    label = f"this machine ({cores * processes} core{'s' * (cores * processes > 1)}, {made.name})"
    return Cluster(made, processes, processes, label=label)


def plain(processes: int, device: str) -> Cluster:
    """So many devices of the kind that is here, by what they are: the same in every process of a run."""
    if device == "cuda":
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count()))
        return Cluster(gpu(), processes, per_node)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return Cluster(replace(accelerator(cpu_kind()), memory=pages / per_node), processes, per_node)


def gpu() -> Accelerator:
    """The first GPU; one that is not in the table has the A100's rates until it is calibrated."""
    name = torch.cuda.get_device_name(0)
    try:
        kind = accelerator(name)
    except UserError:
        kind = replace(accelerator("A100-80GB-SXM"), name=name)
    return replace(kind, memory=float(torch.cuda.get_device_properties(0).total_memory))


def _gpus(processes: int, precision: str) -> Cluster:
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    kind = calibrated(gpu(), calibration(name), precision)
    label = f"this machine ({count} x {name})"
    return Cluster(kind, processes, count, label=label, host_memory=float(free_memory()))


def calibrated(
    device: Accelerator, found: Calibration | None, precision: str, cores: int | None = None
) -> Accelerator:
    """The device with the rates that were measured here in this precision, and what runs have said since.

    cores: those of a CPU that it is; more were measured where processes share them.
    """
    if found is None or precision not in found.rates:
        return device
    rates, slower = found.rates[precision], found.corrections.get(precision, 1.0)
    part = (1.0 if cores is None else cores / found.threads) / slower
    link = device.link
    latency = device.latency
    if found.collective is not None:
        _, latency, per_byte = found.collective
        link = 1 / per_byte / device.link_share
    # a table of kinds does not know the fastest
    peak = max(device.peak_of(precision), rates.products * part)
    return replace(
        device,
        peak={**device.peak, precision_name(precision): peak},
        matmul=rates.products * part / peak,
        memory_share=rates.memory * part / device.memory_bandwidth,
        attention=rates.attention * part / peak,
        attention_backward=rates.attention * part / peak,
        launch=rates.launch * slower,
        update=rates.update * part,
        unpack={kind: rate * part for kind, rate in rates.unpack.items()},
        link=link,
        latency=latency,
        calibrated=True,
    )


def default_processes() -> int:
    """As many as torchrun started; one process for each GPU that there is; else one."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(1, torch.cuda.device_count())
