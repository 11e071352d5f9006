"""A run in several processes of this machine: started, ended together, started again where one was killed."""

import json
import os
import re
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from ropewalk.errors import RopewalkError, UserError
from ropewalk.parallel.launch import FORWARDED, launch
from ropewalk.track import RunDirectory
from ropewalk.train.watchdog import HUNG, SAID

JOB = "ROPEWALK_JOB"
IDENTITY = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
"""what a run's directory has behind its name"""


def together(
    call: str, arguments: list[Any], processes: int, restarts: int, runs: str, name: str
) -> dict[str, Any]:
    """`train.entry.CALL(*arguments)` in so many new processes: the fields of what the first one got.

    Where a process is killed, all are started again, up to `restarts` times, and go on from the run's last
    checkpoint; two ends at the same step are enough. What a process says is wrong is raised here, once.
    """
    key = os.environ.get(JOB) or secrets.token_hex(8)
    reached = None
    for attempt in range(restarts + 1):
        with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
            job = Path(folder, "job.json")
            job.write_text(json.dumps({"call": call, "arguments": arguments}), encoding="utf-8")
            status = launch(["-m", "ropewalk.train.worker", str(job)], processes, {JOB: key})
            answer = job.with_suffix(".result")
            # a signal may reach one of them when the others have told it to stop and it has ended its work
            if answer.is_file() and (status == 0 or -status in FORWARDED):
                values: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
                return values
            # a user's mistake explains what else went wrong; else the first is the cause, and the others have
            # only noticed
            mistakes, errors, crashes = (
                sorted(Path(folder).glob(f"job.{kind}-*"), key=lambda file: file.stat().st_mtime_ns)
                for kind in ("mistake", "error", "crash")
            )
            if mistakes:
                raise UserError(mistakes[0].read_text(encoding="utf-8"))
            if errors:
                raise RopewalkError(errors[0].read_text(encoding="utf-8"))
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            why = crashes[0].read_text(encoding="utf-8").rstrip() if crashes and status > 0 else ""
        run = run_of(f"{JOB}={key}", runs, name)
        step = _last_step(run) if run is not None else None
        before, reached = reached, step
        what = f"a process of the run ended {how}" + (f" after step {step}" if step is not None else "")
        if status == HUNG and run is not None:
            what = (run / "watch" / SAID).read_text(encoding="utf-8")
        if why or run is None or attempt == restarts or (attempt and step == before):
            again = ", for the second time there" if attempt and step == before and not why else ""
            hint = f"; go on with: ropewalk resume {run}" if run is not None else ""
            raise RopewalkError(f"{what}{again}{hint}" + (f"\n{why}" if why else ""))
        print(f"{what}: starting again ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
    raise AssertionError("the last attempt has returned or raised")


def job_key() -> str | None:
    """What the processes of one job share, also after they were started again; None for a process alone."""
    for name in (JOB, "SLURM_JOB_ID"):
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = os.environ["TORCHELASTIC_RUN_ID"]
        return f"torchrun={name if name != 'none' else os.getppid()}"
    return None


def run_of(key: str | None, runs: str, name: str) -> Path | None:
    """The newest unfinished run of this name that the job has begun; None where there is none."""
    if key is None:
        return None
    for path in sorted(Path(runs).glob(f"{name}-*/environment.json"), reverse=True):
        if not IDENTITY.fullmatch(path.parent.name.removeprefix(f"{name}-")):
            continue  # `base-lora-...` is not a run of `base`
        run = RunDirectory(path.parent)
        facts = run.read_json("environment.json") or {}
        if facts.get("job") == key and not (run.path / "report.md").exists():
            return run.path
    return None


def _last_step(run: Path) -> int:
    return max((record.get("step", 0) for record in RunDirectory(run).read()), default=0)
