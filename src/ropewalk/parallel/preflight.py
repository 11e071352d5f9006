"""What does not fit together in a set of processes, said in one message before a model is loaded.

Each process says where it is and what it has; the first of them compares. It takes well under a second
where nothing is wrong.
"""

import os
import secrets
import shutil
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ropewalk.errors import UserError
from ropewalk.layout import Layout, told_by_launcher
from ropewalk.parallel.world import World, processes

CLOCKS = 5.0
"""Seconds by which the clocks of two machines may differ: the watchdog compares times of notes from all of
them, in tens of seconds. NTP keeps milliseconds."""
SPEAKING = 3.0
"""Seconds that the first process has to say what is wrong: the end of any other ends it too."""
SEEN = 15.0
"""Seconds in which a new folder must be seen by the others; shared file systems cache for some."""


@dataclass(frozen=True)
class Facts:
    """One process. `versions`: of what must be the same everywhere, by name, as far as it knows them."""

    rank: int
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    clock: float = 0.0
    """seconds, read when all have read theirs"""
    gpu: str | None = None
    """its UUID"""
    unwritable: str | None = None
    """why the folder of runs cannot be written to; None where it can"""


def meet(device: str, layout: Layout, folder: Path, versions: Callable[[bool], dict[str, str]]) -> World:
    """`World.join`, and before and after it what can be known to be wrong: UserError with all of that.

    `folder`: where the run will be, which all processes write to. `versions(whole)`: see `Facts`; `whole` in
    one process of each machine, for what takes a while.
    """
    if processes() > 1:
        _check_place(device)
    world = World.join(device, layout)
    if world.size > 1:
        _check_together(world, device, folder, versions)
    return world


def _check_place(device: str) -> None:
    """What a process can see alone, and would wait half an hour for, or die of, when it joins the others."""
    rank, host = os.environ.get("RANK", "?"), socket.gethostname()
    address = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"process {rank} on {host}: MASTER_ADDR, where the processes meet, is {address!r}, which cannot "
            f"be resolved ({error.strerror}); give a name that every machine knows, or its IP address "
            "(torchrun: --rdzv-endpoint and --local-addr)"
        ) from None
    local = told_by_launcher("LOCAL_RANK") or 0
    there = torch.cuda.device_count() if device == "cuda" else local + 1
    if local >= there:
        raise UserError(
            f"process {rank} on {host} is number {local + 1} on its machine, which shows {there} "
            f"GPU{'s' * (there != 1)}; start no more processes than GPUs (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )


def _check_together(
    world: World, device: str, folder: Path, versions: Callable[[bool], dict[str, str]]
) -> None:
    probe = folder / str(world.share(f".preflight-{secrets.token_hex(4)}.tmp"))
    try:
        unwritable = _make(probe) if world.first else None
        made = world.share(unwritable is None)  # the others look for it now
        if made and not world.first:
            unwritable = _write(probe / str(world.rank))
        known = versions(world.local_rank == 0)
        gpu = str(torch.cuda.get_device_properties(world.local_rank).uuid) if device == "cuda" else None
        world.wait()  # so that all read their clocks now
        mine = Facts(world.rank, socket.gethostname(), known, time.time(), gpu, unwritable)
        everybody: list[Facts] = world.each(mine)
    finally:
        if world.first:
            shutil.rmtree(probe, ignore_errors=True)
    found = problems(everybody, str(folder.absolute()))
    if found and world.first:
        raise UserError("\n  ".join(["these processes cannot train together:", *found]))
    if found:
        time.sleep(SPEAKING)
        raise UserError(f"process {world.rank} ends: process 0 says why")


def problems(everybody: list[Facts], folder: str) -> list[str]:
    """A line for each thing that is wrong, with what to do, naming processes and machines."""
    return [*_gpus(everybody), *_versions(everybody), *_clocks(everybody), *_folder(everybody, folder)]


def _gpus(everybody: list[Facts]) -> Iterable[str]:
    for gpu, them in _by([one.gpu for one in everybody], everybody).items():
        if gpu is not None and len(them) > 1:
            yield f"one GPU for several: {_named(them)} have {gpu}; start one process for each GPU"


def _versions(everybody: list[Facts]) -> Iterable[str]:
    for name in sorted({name for one in everybody for name in one.versions}):
        known = [one for one in everybody if name in one.versions]
        found = _by([one.versions[name] for one in known], known)
        if len(found) > 1:
            said = ", ".join(f"{version} in {_named(them)}" for version, them in found.items())
            yield f"different versions of {name}: {said}; install the same everywhere"


def _clocks(everybody: list[Facts]) -> Iterable[str]:
    hosts = _by([one.host for one in everybody], everybody)
    clocks = {host: min(one.clock for one in them) for host, them in hosts.items()}  # the others read late
    usual = statistics.median_low(clocks.values())
    for host, clock in clocks.items():
        if abs(clock - usual) > CLOCKS:
            how = f"{abs(clock - usual):.0f} s {'ahead of' if clock > usual else 'behind'}"
            yield f"the clock of {host} is {how} the others' ({CLOCKS:.0f} s are allowed); set it with NTP"


def _folder(everybody: list[Facts], folder: str) -> Iterable[str]:
    for why, them in _by([one.unwritable for one in everybody], everybody).items():
        if why is not None:
            yield f"{folder}: {_named(them)}: {why}; set runs to a folder that all can write to"


def _by(values: list[str] | list[str | None], them: list[Facts]) -> dict[str | None, list[Facts]]:
    found: dict[str | None, list[Facts]] = defaultdict(list)
    for value, one in zip(values, them, strict=True):
        found[value].append(one)
    return found


def _named(them: list[Facts]) -> str:
    """`process 0 on node1, processes 4-7, 9 on node2`"""
    parts = []
    for host, here in _by([one.host for one in them], them).items():
        ranges: list[list[int]] = []
        for rank in sorted(one.rank for one in here):
            if ranges and rank == ranges[-1][-1] + 1:
                ranges[-1][1:] = [rank]
            else:
                ranges.append([rank])
        said = ", ".join("-".join(map(str, ends)) for ends in ranges)
        parts.append(f"process{'es' * (len(here) > 1)} {said} on {host}")
    return ", ".join(parts)


def _make(probe: Path) -> str | None:
    """A new folder; or why there is none."""
    try:
        probe.mkdir(parents=True)
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None


def _write(file: Path) -> str | None:
    """A file in a folder that the first process has made; or why there is none."""
    limit = time.monotonic() + SEEN
    while True:
        try:
            file.touch(exist_ok=False)
            return None
        except FileNotFoundError:
            if time.monotonic() > limit:
                return "does not see what process 0 has written there: the folder is not shared"
            time.sleep(0.1)
        except OSError as error:
            return f"cannot write there ({error.strerror})"
