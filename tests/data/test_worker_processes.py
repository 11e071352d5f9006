"""What happens to worker processes: killed ones are told of, and none outlives the process that began it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest

from ropewalk.data import parts
from ropewalk.data.parts import Makers
from ropewalk.errors import RopewalkError, UserError

SLOW = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
@dataclass(frozen=True)
class Slow:
    path: Path
    weight: int = 1 << 30
    def make(self, path):
        path.write_text("half")
        Path(str(self.path) + ".begun").touch()
        time.sleep(60)
"""
RUN = """


import signal
from pathlib import Path
from ropewalk.data.parts import Makers
from slow import Slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell begins in the background has none
try:
    with Makers(workers=2) as makers:
        makers.make("x", [Slow(Path("parts") / str(i)) for i in range(4)])
except KeyboardInterrupt:
    raise SystemExit(130)
"""


TWICE = """
import os, signal, sys, time
from pathlib import Path
from ropewalk.data import parts
remove = Path.unlink
def disturbed(path, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return remove(path, **options)
class Twice:
    path = Path(sys.argv[1])
    def make(self, path):
        path.write_text("half")
        Path.unlink = disturbed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
parts._work(Twice())
"""


class Killed:
    """A task whose process is killed, as a system without memory does it."""

    weight = 1 << 30

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_message(tmp_path):
    with Makers(workers=2) as makers, pytest.raises(RopewalkError, match="a worker process was killed"):
        makers.make("x", [Killed(tmp_path / str(i)) for i in range(3)])


def test_a_worker_stopped_twice_leaves_nothing_half_made(tmp_path):
    """A pool ends all its processes again when one has ended, in the middle of their cleaning up."""
    folder = tmp_path / "parts"
    done = subprocess.run([sys.executable, "-c", TWICE, str(folder / "0")], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1, done.stderr
    assert list(folder.iterdir()) == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize(("name", "status", "clean"), [("SIGINT", 130, True), ("SIGTERM", -15, False)])
def test_a_stopped_preparation_leaves_no_process_and_stops_at_once(tmp_path, name, status, clean, starting):
    """By Ctrl-C in a terminal, which reaches the workers too, or by a scheduler, which reaches the parent;
    while workers are at work, or while they are being started."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    began = subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(spawned(began.pid) if starting else list(tmp_path.glob("parts/*.begun"))) < 2:
        assert time.monotonic() < deadline
        assert began.poll() is None, began.stderr.read()
        time.sleep(0.1)
    time.sleep(0.4 if starting else 0)  # Python has begun there, and imports what it is to run
    group = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and session(p) == began.pid]
    assert len(group) >= 3
    (os.killpg if clean else os.kill)(began.pid, getattr(signal, name))
    assert began.wait(30) == status
    said = began.stderr.read().decode()
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while any(map(alive, group)):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    if clean and not starting:
        assert sorted(p.suffix for p in (tmp_path / "parts").iterdir()) == [".begun"] * 2, "nothing half made"


def session(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3])
    except OSError:
        return -1


def spawned(leader: int) -> list[Path]:
    """The worker processes of its session, from their first moment on."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and session(folder) == leader:
            with suppress(OSError):
                found += [folder] if b"spawn_main" in (folder / "cmdline").read_bytes() else []
    return found


def test_a_cluster_that_writes_elsewhere_is_one_message(tmp_path, monkeypatch):
    class Elsewhere:
        def __init__(self, on: str) -> None:
            pass

        def submit(self, function, task):
            future: Future[None] = Future()
            future.set_result(None)  # it was made, in the file system of another machine
            return future

        def shutdown(self, cancel_futures=True):
            pass

    monkeypatch.setattr(parts, "Cluster", Elsewhere)
    with Makers(on="dask:there") as makers, pytest.raises(UserError, match="must be in a file system that"):
        makers.make("x", [Killed(tmp_path / "0")])
