"""`launch`: from a recipe and a number of machines to processes that train, or to what starts them."""

import dataclasses
import secrets
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ropewalk.errors import RopewalkError, UserError
from ropewalk.launch.kubernetes import job_name, manifest
from ropewalk.launch.scripts import local_script, slurm_script
from ropewalk.launch.start import Start
from ropewalk.layout import Layout
from ropewalk.recipe import Machine, load_recipe, resolve

Place = Literal["local", "slurm", "kubernetes"]
IMAGE, VOLUME = "IMAGE", "CLAIM"
"""What a manifest says that is only looked at."""
PASSED = {number: number for number in (signal.SIGINT, signal.SIGTERM)} | {
    number: signal.SIGTERM for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
}
"""What torchrun is sent for a signal to `launch`: on SIGTERM the processes save a checkpoint and end."""
CORES = 4
"""CPU cores of each process on a machine that is not this one."""


@dataclass(frozen=True)
class Launched:
    """What was started, or would have been."""

    on: Place
    script: str
    """bash, or YAML for Kubernetes"""
    logs: str
    """folder where torchrun keeps each process's output"""
    answer: str | None = None
    """what sbatch or kubectl said; None where they were not asked"""
    status: int = 0
    """exit status of torchrun for a run on this machine"""


def launch(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    on: Place = "local",
    nodes: int = 1,
    processes_per_node: int | None = None,
    cores: int | None = None,
    sbatch: Sequence[str] = (),
    image: str | None = None,
    volume: str | None = None,
    dry_run: bool = False,
) -> Launched:
    """Trains a recipe in several processes under torchrun: here, in a SLURM job, or in a PyTorchJob.

    `recipe`: its file, or a run directory to go on with.
    `processes_per_node`: unless told, what the recipe's `parallel` asks for. `cores`: CPU cores of each.
    `sbatch`: further options of a SLURM job. `image`, `volume`: see `kubernetes.manifest`. `dry_run`: only
    render. Returns when the run is over (local) or has been handed in. UserError for what is wrong with the
    recipe, with its layout over so many processes, or where sbatch or kubectl is missing; RopewalkError where
    they refuse.
    """
    start = plan(str(recipe), overrides, on, nodes, processes_per_node, cores)
    programs = sysconfig.get_path("scripts")
    _check_options(on, sbatch, image, volume, dry_run)
    if on == "local":
        script = local_script(start, programs)
        return Launched(on, script, start.logs, status=0 if dry_run else _run(script))
    if on == "slurm":
        script, command = slurm_script(start, programs, sbatch), ["sbatch"]
    else:
        text = _recipe_file(start.source).read_text(encoding="utf-8")
        job = job_name(start.name, secrets.token_hex(3))
        script = manifest(start, text, job, image or IMAGE, volume or VOLUME)
        command = ["kubectl", "apply", "-f", "-"]
    return Launched(on, script, start.logs, None if dry_run else _hand_in(command, script, on))


def _check_options(
    on: Place, sbatch: Sequence[str], image: str | None, volume: str | None, dry_run: bool
) -> None:
    if sbatch and on != "slurm":
        raise UserError("--sbatch: is for --on slurm")
    if any("\n" in option or not option.startswith("-") for option in sbatch):
        raise UserError("--sbatch: takes one option of sbatch, as in --sbatch=--partition=gpu")
    if on != "kubernetes" and (image or volume):
        raise UserError("--image, --volume: are for --on kubernetes")
    if on == "kubernetes" and not dry_run and not (image and volume):
        raise UserError("--on kubernetes: give --image and --volume (or look at it with --dry-run)")


def plan(
    source: str, overrides: Sequence[str], on: Place, nodes: int, processes: int | None, cores: int | None
) -> Start:
    """What is to be started. UserError where the recipe cannot be spread over so many processes."""
    if on not in get_args(Place):
        raise UserError(f"--on {on}: is none of {', '.join(get_args(Place))}")
    counts = {"--nodes": nodes, "--processes-per-node": processes, "--cores": cores}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{option}: {count} is less than 1")
    if on == "local" and nodes != 1:
        raise UserError("--nodes: --on local has one; use --on slurm or --on kubernetes")
    recipe = load_recipe(_recipe_file(source), overrides)
    degrees = {field.name: getattr(recipe.parallel, field.name) for field in dataclasses.fields(Layout)}
    if processes is None:
        processes = max(1, Layout(**degrees).processes // nodes)
    here = Machine.here()
    # `auto` means a GPU on a cluster: the machine that hands a job in often has none
    machine = here if on == "local" else dataclasses.replace(here, gpu=True, gpu_bfloat16=True)
    resolved = resolve(recipe, machine=dataclasses.replace(machine, processes=nodes * processes)).recipe
    return Start(
        name=recipe.name,
        source=source,
        overrides=tuple(overrides),
        runs=recipe.runs,
        nodes=nodes,
        processes=processes,
        cores=cores or (max(1, here.cores // processes) if on == "local" else CORES),
        restarts=recipe.parallel.restarts,
        gpu=resolved.train.device == "cuda",
        resume=Path(source).is_dir(),
    )


def _recipe_file(source: str) -> Path:
    return Path(source, "recipe.yaml") if Path(source).is_dir() else Path(source)


def _run(script: str) -> int:
    """The script's exit status; a signal that ends it goes on to torchrun, which is waited for."""
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(PASSED[signal.Signals(number)])
        if not started:  # it is just being started
            early.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, pass_on) for number in PASSED}
    try:
        started.append(subprocess.Popen(["bash", "-c", script], start_new_session=True))
        for number in early:
            pass_on(number, None)
        status = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status  # as a shell says it


def _hand_in(command: list[str], script: str, on: Place) -> str:
    program = shutil.which(command[0])
    if program is None:
        raise UserError(
            f"--on {on}: {command[0]} is not on this machine's PATH; run this where jobs are handed in, "
            "or take the script elsewhere with --dry-run"
        )
    done = subprocess.run([program, *command[1:]], input=script, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "it said nothing"
        raise RopewalkError(f"{' '.join(command)} ended with status {done.returncode}: {said}")
    return done.stdout.strip()
