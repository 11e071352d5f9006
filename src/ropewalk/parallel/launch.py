"""Starts the processes of a run on this machine, where nobody else (torchrun, a scheduler) has."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.distributed import TCPStore

from ropewalk.errors import UserError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 10.0
"""Seconds that the others have to end when one has failed."""
FEW, PER_CORE = 16, 4
"""Processes that any machine may be given, and for each of its cores: more are a slip of the pen."""


def launch(arguments: list[str], processes: int, variables: Mapping[str, str] | None = None) -> int:
    """Runs `python ARGUMENTS` in so many processes with torchrun's variables: their exit status.

    That of the first to fail (less than 0: the signal that ended it), or 0. Signals go on to all;
    when one fails, the others are ended. UserError for more processes than a machine is meant to run.
    """
    cores = len(os.sched_getaffinity(0))
    if processes > max(FEW, PER_CORE * cores):
        raise UserError(
            f"parallel: {processes} processes on this machine of {cores} cores; at most "
            f"{max(FEW, PER_CORE * cores)} are started here, more by torchrun on several machines"
        )
    # they meet here, as torchrun's do at their agent: a port that is only looked for may be taken by then
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(variables or {}) | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
    }
    command = [sys.executable, *arguments]
    running = [
        # a session of their own: Ctrl-C comes to them once, from here
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True
        )
        for i in range(processes)
    ]
    try:
        with _forwarding(running):
            return _wait(running)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()


def _wait(running: list[subprocess.Popen[bytes]]) -> int:
    limit = float("inf")
    while None in [process.poll() for process in running]:
        if any(process.returncode for process in running):
            limit = min(limit, time.monotonic() + GRACE)
        if time.monotonic() > limit:
            break  # they wait for the one that is gone
        time.sleep(0.05)
    failed = [process.returncode for process in running if process.returncode]
    # one that was killed is the cause, and the others have only noticed
    killed = [status for status in failed if status < 0]
    return (killed or failed or [0])[0]


@contextmanager
def _forwarding(running: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, _: object) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
