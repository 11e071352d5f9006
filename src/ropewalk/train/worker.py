"""One process of a run in several: `python -m ropewalk.train.worker JOB.json`, started by `together`."""

import ctypes
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def leave(status: int) -> NoReturn:
    """Ends a process of a run. Not by way of C++'s destructors, which now and then abort while threads of a
    process group still run: a run that has done all its work would look killed, and be started again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> int:
    # where the process that started this one is killed, nobody else would end it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    from ropewalk import train
    from ropewalk.errors import RopewalkError, UserError

    try:
        result = getattr(train, job["call"])(*job["arguments"])
    except (UserError, RopewalkError) as error:
        kind, status = ("mistake", 2) if isinstance(error, UserError) else ("error", 1)
        path.with_suffix(f".{kind}-{os.environ['RANK']}").write_text(str(error), encoding="utf-8")
        return status
    except Exception:
        path.with_suffix(f".crash-{os.environ['RANK']}").write_text(traceback.format_exc(), encoding="utf-8")
        return 3
    if os.environ["RANK"] == "0":
        path.with_suffix(".result").write_text(json.dumps(asdict(result), default=str), encoding="utf-8")
    return 0


if __name__ == "__main__":
    leave(main())
