"""Injects faults into runs and looks what becomes of them: `python tests/faults/campaign.py --seed 1`.

The seed draws for each injection its kind, the layout of the run, process, step and moment. Afterwards the
run must be finished, with the losses and the weights of a run that nothing has happened to, no checkpoint
that was whole may be lost, and what was said must name the fault. The last line is
`N injected, N survived, N named`; the exit status is 1 where a number is lower than the first.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from injected import BROKEN_READ, EVERY, STEPS, Injection, damage, leave_out, plant
from runs import call, make_files, overrides, processes, recipe

from ropewalk.track import RunDirectory
from ropewalk.train.checkpoint import find_damage, list_checkpoints

KINDS: dict[str, tuple[str, ...]] = {
    "kill": ("before", "forward", "save"),
    "kill all": ("before", "forward", "save"),
    "hang": ("before", "forward", "save"),
    "terminate": ("before", "forward", "save"),
    "torn": ("running", "stopped"),
    "flipped": ("running", "stopped"),
    "full disk": ("part", "manifest"),
    "nan": ("skip", "rollback", "none"),
    "slow": ("data", "blocks"),
    "loader": ("read",),
}
"""The moments, or for a NaN the policies, of each kind."""
STOPS = ("kill all", "terminate", "full disk", "loader")
"""What a run does not go on after by itself."""
TWO = ("shard=2", "replicate=2", "tensor=2")
FOUR = ("shard=4", "replicate=2,shard=2", "tensor=2,shard=2")


def draw(seed: int, number: int, only: str | None = None) -> Injection:
    """Injection `number` (from 0): each kind once in ten, in another order each time, its moments in turn."""
    block, place = (number, 0) if only else divmod(number, len(KINDS))
    kind = only or Random(f"{seed} {block}").sample(sorted(KINDS), len(KINDS))[place]
    moments = KINDS[kind]
    moment = moments[(block + Random(f"{seed} {kind}").randrange(len(moments))) % len(moments)]
    random = Random(f"{seed} {number}")
    layout = random.choice(random.choice((TWO, TWO, FOUR)))
    rank = random.randrange(processes(layout))
    step = random.randint(1, STEPS)
    if kind == "slow":
        step = random.randint(1, 4)  # it must last for two looks
        moment = "data" if "tensor" in layout else moment  # whose blocks wait for each other
    elif kind == "nan":
        step = random.randint(2, STEPS - 1)
    elif kind == "terminate":
        step = random.randint(1, STEPS - 3)  # none is asked in the last step
    elif kind in ("torn", "flipped"):
        step = random.choice((6, 8))  # 2 and 4, or 6 too, are written
    if moment == "save" or kind == "full disk":
        step += step % EVERY  # one with a checkpoint
        rank = 0 if moment == "manifest" else rank
    elsewhere = random.choice((layout, layout, layout, *(name for name in TWO if name != layout), "one"))
    return Injection(number, kind, layout, rank, step, moment, elsewhere, random.randrange(2**32))


def stops(injection: Injection) -> bool:
    return injection.kind in STOPS or injection.moment in ("stopped", "none")


class Campaign:
    """Runs in `folder`: undisturbed ones, one for each layout, and `inject`ed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_files(folder)

    def recipe(self, runs: Path, injection: Injection | None = None, layout: str = "") -> dict[str, Any]:
        kind, moment = (injection.kind, injection.moment) if injection else ("", "")
        layout = injection.layout if injection else layout
        fields: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "checkpoint_every": EVERY}
        if kind == "nan":
            fields |= {"spike": {"policy": moment}}
            fields |= {"checkpoint_every": 1} if moment == "skip" else {}
        # much longer than a step on a machine that does other things too
        hang = 2.0 * processes(layout) if kind == "hang" else None
        return recipe(self.folder, runs, layout, hang, **fields)

    def undisturbed(self, layout: str, without: int | None = None) -> Path:
        """The run of a layout, made once; `without` a batch."""
        runs = self.folder / f"whole-{layout}-{without}"
        if not runs.exists():
            runs.mkdir()
            hook = (lambda: None) if without is None else (lambda: leave_out(without))
            status = call("train", [self.recipe(runs, layout=layout)], runs / "log", hook)
            assert status == 0, (runs / "log").read_text()
        return run_in(runs)

    def inject(self, injection: Injection) -> tuple[bool, list[str], list[str]]:
        """Whether the fault has happened, and what did not survive, and what was not named."""
        runs = self.folder / f"injection-{injection.number}"
        runs.mkdir()
        log = runs / "log"
        kind, moment = injection.kind, injection.moment
        if moment == "stopped":
            stopped_copy(self.undisturbed(injection.layout), injection, runs)
            status: int | None = -9
        else:
            status = call("train", [self.recipe(runs, injection)], log, lambda: plant(injection, runs))
        note = runs / "injected.json"
        if not note.exists():
            return False, [f"nothing happened, and the run ended with {status}"], []
        noted = json.loads(note.read_text())
        run, lost = run_in(runs), []
        must_stop = stops(injection)
        if must_stop:
            expected = {"kill all": -9, "terminate": 0}.get(kind, -9 if moment == "stopped" else 1)
            if status != expected:
                lost.append(f"it ended with {status} and not {expected}")
            if (run / "report.md").exists():
                lost.append("it did not stop")
            lost += lost_checkpoints(run, noted["valid"])
            wait_for_the_lock(run)
            same = injection.resume_in == injection.layout
            words = [] if same else overrides(injection.resume_in)
            status = call("resume", [run, words], log, lambda: plant(injection, runs))
        if status != 0:
            lost.append(f"in the end the status is {status}")
        lost += lost_checkpoints(run, noted["valid"])
        lost += self.differences(run, injection, must_stop)
        return True, lost, unnamed(log.read_text(), run, injection, noted)

    def differences(self, run: Path, injection: Injection, resumed: bool) -> list[str]:
        """Between a run and what it must have become."""
        found = []
        if not (run / "report.md").exists():
            found.append("the run is not finished")
        found += [f"{path.name} is left" for path in run.rglob(".*.tmp")]
        got, step = losses(run), injection.step
        if injection.moment == "skip":
            wanted = losses(self.undisturbed(injection.layout))
            if [s for s, _ in got] != [s for s in range(1, STEPS + 1) if s != step]:
                found.append(f"steps {[s for s, _ in got]}")
            if got[: step - 1] != wanted[: step - 1]:
                found.append("other losses before the step that was skipped")
            before, after = (tensors(run, s, "model/") for s in (step - 1, step))
            return found + (["the skipped step has changed weights"] if before != after else [])
        without = step - 1 if injection.moment == "rollback" else None
        whole = self.undisturbed(injection.layout, without)
        wanted = losses(whole)
        if [s for s, _ in got] != [s for s, _ in wanted]:
            return [*found, f"steps {[s for s, _ in got]}"]
        if resumed and injection.resume_in != injection.layout:
            far = [s for (s, a), (_, b) in zip(got, wanted, strict=True) if abs(a - b) > 1e-5 * abs(b)]
            return found + ([f"other losses in steps {far}"] if far else [])
        if got != wanted:
            found.append(
                f"other losses in steps {[a[0] for a, b in zip(got, wanted, strict=True) if a != b]}"
            )
        if tensors(run, STEPS) != tensors(whole, STEPS):
            found.append("other weights, or states of the optimizer, in the end")
        return found


def run_in(runs: Path) -> Path:
    """The one run there."""
    (path,) = (file.parent for file in runs.glob("*/recipe.yaml"))
    return path


def stopped_copy(whole: Path, injection: Injection, runs: Path) -> None:
    """A run as a kill before a step would have left it, and then its newest checkpoint damaged."""
    run = runs / whole.name
    shutil.copytree(whole, run)
    (run / "report.md").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name[5:]) >= injection.step:
            shutil.rmtree(path)
    *before, newest = list_checkpoints(run / "checkpoints")
    damaged = str(damage(injection, newest))
    (runs / "injected.json").write_text(
        json.dumps({"valid": [path.name for path in before], "damaged": damaged})
    )


def wait_for_the_lock(run: Path) -> None:
    """Processes whose parent was killed are gone a moment later."""
    deadline = time.monotonic() + 30
    while RunDirectory(run).locked() and time.monotonic() < deadline:
        time.sleep(0.05)


def lost_checkpoints(run: Path, valid: list[str]) -> list[str]:
    """What is wrong with checkpoints that were whole, or, in a finished run, with any."""
    there = {path.name: path for path in list_checkpoints(run / "checkpoints")}
    wanted = set(valid)
    if (run / "report.md").exists():
        wanted |= set(there) | {f"step-{step:08d}" for step in range(EVERY, STEPS + 1, EVERY)}
    gone = [f"{name} is gone" for name in sorted(wanted - set(there))]
    return gone + [what for name in sorted(wanted & set(there)) if (what := find_damage(there[name]))]


def losses(run: Path) -> list[tuple[int, float]]:
    records = RunDirectory(run).read()
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def tensors(run: Path, step: int, inside: str = "") -> dict[str, str]:
    """Hashes of the tensors' files of a checkpoint: weights, states of the optimizer and the generators."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return {n: sha for n, sha in files.items() if n.endswith(".safetensors") and n.startswith(inside)}


def unnamed(said: str, run: Path, injection: Injection, noted: dict[str, Any]) -> list[str]:
    """Of what must be said of a fault, what was not; and tracebacks where no bug is to be shown."""
    rank, step, kind = injection.rank, injection.step, injection.kind
    killed = r"a process of the run ended by SIGKILL after step \d+: starting again \(1 of 3\)"
    go_on = "go on with: ropewalk resume " + re.escape(str(run))
    patterns: dict[str, list[str]] = {
        "kill": [killed],
        "kill all": ["going on after step" if noted["valid"] else ""],
        "hang": [rf"step \d+ hangs: process {rank} on \S+ never came .*: starting again \(1 of 3\)"],
        "terminate": [rf"stopped by SIGTERM after step \d+ of {STEPS}; all of it is in \S+; {go_on}"],
        "full disk": [
            rf"error: \S*step-{step:08d}\S*: the disk is full \(.*make room"
            + (rf".*checkpoints before, up to {noted['valid'][-1]}, are kept" if noted["valid"] else "")
        ],
        "slow": [rf"process {rank} on \S+ is slow: .* times the median's work"],
        "loader": [rf"{re.escape(BROKEN_READ)}", go_on],
    }
    if kind in ("torn", "flipped"):
        file = Path(noted["damaged"])
        name = f"step-{(step - 1) // EVERY * EVERY:08d}"
        patterns[kind] = [
            rf"warning: {re.escape(str(file))}: .*; checkpoint {name} is not used",
            f"going on after step {noted['valid'][-1][5:].lstrip('0')}",
        ]
        if injection.moment == "running":
            patterns[kind].append(killed)
    wrong = rf"step {step}\S*\s+the loss is (nan|\S+) and the gradient norm nan.*document"
    done = {"skip": "update skipped", "rollback": "from now on without the samples of this step"}
    patterns["nan"] = [wrong + ".*" + done.get(injection.moment, "")]
    missing = [f"not said: {what}" for what in patterns[kind] if not re.search(what, said)]
    return missing + (["a traceback"] if kind != "loader" and "Traceback" in said else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", choices=KINDS, help="this kind alone")
    parser.add_argument("--only-number", type=int, help="one injection, counted from 0")
    wanted = parser.parse_args()
    numbers = range(wanted.count) if wanted.only_number is None else [wanted.only_number]
    folder = Path(tempfile.mkdtemp(prefix="ropewalk-faults-"))
    campaign, counts, clean = Campaign(folder), [0, 0, 0], True
    for number in numbers:
        injection, began = draw(wanted.seed, number, wanted.only), time.monotonic()
        try:
            happened, lost, silent = campaign.inject(injection)
        except Exception as error:  # whatever a run has left that cannot be read is not survived
            happened, lost, silent = True, [f"{type(error).__name__}: {error}"], ["not looked at"]
        good = happened and not lost, happened and not silent
        counts = [count + more for count, more in zip(counts, (True, *good), strict=True)]
        where = injection.layout
        if injection.resume_in != where and (
            injection.kind in STOPS or injection.moment in ("stopped", "none")
        ):
            where += f" then {injection.resume_in}"
        print(
            f"{number:3d}  {injection.kind:9s}  {injection.moment:8s}  {where:32s}  rank {injection.rank}  "
            f"step {injection.step}  {time.monotonic() - began:5.1f} s  "
            + ("survived, named" if all(good) else "; ".join([*lost, *silent])),
            flush=True,
        )
        runs = folder / f"injection-{number}"
        if all(good):
            shutil.rmtree(runs)
        else:
            only = f" --only '{wanted.only}'" if wanted.only else ""
            print(f"     {runs}: again with --seed {wanted.seed}{only} --only-number {number}", flush=True)
            clean = False
    if clean:
        shutil.rmtree(folder)
    print(f"{counts[0]} injected, {counts[1]} survived, {counts[2]} named")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
