"""The bash scripts: torchrun on this machine, and on each machine of a SLURM job."""

import shlex
from collections.abc import Sequence

from ropewalk.launch.start import GRACE, Start


def local_script(start: Start, programs: str) -> str:
    """Runs `start.processes` processes here; `programs` is the folder of torchrun and ropewalk."""
    options = ["--standalone", "--local-addr=127.0.0.1", *_options(start), f"--log-dir={start.logs}"]
    lines = ["exec torchrun", shlex.join(options), shlex.join(start.training())]
    return f"""\
#!/usr/bin/env bash
# {_processes(start)} on this machine
# shellcheck disable=SC2016 # nothing in single quotes is for this shell
set -euo pipefail
{_exports(start, programs)}

{_CONTINUED.join(lines)}
"""


def slurm_script(start: Start, programs: str, sbatch: Sequence[str] = ()) -> str:
    """For sbatch: a torchrun on each node. `sbatch`: further options, a line each (`--partition=gpu`).

    Shortly before its time is up SLURM signals this script, which passes it on to the processes: they save a
    checkpoint and end, and the job is queued again. It keeps its number, by which its run is found.
    """
    request = [
        f"--job-name={start.name}",
        f"--nodes={start.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={start.processes * start.cores}",
        *([f"--gpus-per-node={start.processes}"] if start.gpu else []),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{GRACE}",
        *sbatch,
    ]
    lines = [
        f"srun --kill-on-bad-exit=0 --wait={GRACE}",
        f"bash -c {shlex.quote(_AGENT)} torchrun",
        '--rdzv-backend=c10d --rdzv-endpoint="${machines[0]}:$port" --rdzv-id="$SLURM_JOB_ID"',
        shlex.join([f"--nnodes={start.nodes}", *_options(start)]),
        shlex.join(start.training()),
    ]
    directives = "\n".join(f"#SBATCH {option}" for option in request)
    return f"""\
#!/usr/bin/env bash
{directives}
# {_processes(start)} on each of {start.nodes} machine{"s" * (start.nodes != 1)}
# shellcheck disable=SC2016 # nothing in single quotes is for this shell
set -euo pipefail
{_exports(start, programs)}
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from sbatch
export ROPEWALK_LOGS={shlex.quote(start.logs)}
{_BEFORE}
{_CONTINUED.join(lines)} &
{_AFTER}"""


_CONTINUED = " \\\n  "

# SLURM's name of a machine is one that the others know; the one it has for itself need not be
_AGENT = 'exec torchrun --local-addr="$SLURMD_NODENAME" --log-dir="$ROPEWALK_LOGS/$SLURMD_NODENAME" "$@"'

_BEFORE = """\
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))

asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1 # the processes save a checkpoint and end
trap : TERM # of scancel or a preemption: the processes have it too, and are waited for
"""

_AFTER = """\
step=$!

while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before srun has ended
  wait "$step" || true
done
status=0
wait "$step" || status=$?
if [[ -n $asked && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _options(start: Start) -> list[str]:
    return [f"--nproc-per-node={start.processes}", f"--max-restarts={start.restarts}"]


def _exports(start: Start, programs: str) -> str:
    lines = [f'export PATH={shlex.quote(programs)}:"$PATH"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in start.variables.items()]
    return "\n".join(lines)


def _processes(start: Start) -> str:
    return f"{start.processes} process{'es' * (start.processes != 1)}"
