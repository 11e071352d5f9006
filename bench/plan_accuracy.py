"""How well the planner predicts published runs; and with the rates fitted on all models but the one
predicted.

    python bench/plan_accuracy.py                   the table of docs/plan.md
    python bench/plan_accuracy.py --leave-one-out   fits again for each model (minutes)

The runs are those of ../shared/reference, described in tests/plan/published_runs.py. What is fitted is one
set of shares for each kind of accelerator, of which `plan/accelerators.yaml` has the result.
"""

import argparse
import dataclasses
import math
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "plan"))

from published_runs import Run, published  # noqa: E402

from ropewalk.plan.step_time import step_time  # noqa: E402

Shares = dict[str, float]


def kind(run: Run) -> str:
    return run.cluster.accelerator.name[:4]


def start(runs: list[Run]) -> Shares:
    """What the table of accelerators has."""
    found: Shares = {}
    for run in runs:
        device = run.cluster.accelerator
        found["memory_share"] = device.memory_share
        for name in ("matmul", "attention", "attention_backward"):
            found[f"{kind(run)}.{name}"] = getattr(device, name)
        if device.matmul_float8:
            found[f"{kind(run)}.matmul_float8"] = device.matmul_float8
    return found


def error(run: Run, shares: Shares) -> float:
    """Log of predicted over measured seconds."""
    own = {name.partition(".")[2]: share for name, share in shares.items() if name.startswith(kind(run))}
    device = dataclasses.replace(run.cluster.accelerator, memory_share=shares["memory_share"], **own)
    where = dataclasses.replace(run.cluster, accelerator=device)
    return math.log(step_time(run.work, where).seconds / run.seconds)


def loss(runs: list[Run], shares: Shares) -> float:
    errors = [error(run, shares) for run in runs]
    return sum(abs(e) + 2 * e * e for e in errors) / len(errors)


def fit(runs: list[Run], shares: Shares, rounds: int = 4) -> Shares:
    """Coordinate descent, each share by a tenth at first."""
    best, steps = loss(runs, shares), dict.fromkeys(shares, 0.1)
    for _ in range(rounds):
        for name in shares:
            for sign in (1, -1):
                other = {**shares, name: min(0.98, shares[name] * (1 + sign * steps[name]))}
                if (found := loss(runs, other)) < best:
                    best, shares = found, other
                    break
            else:
                steps[name] /= 2
    return shares


def show(title: str, errors: dict[str, list[float]]) -> None:
    print(f"\n| {title} | runs | mean absolute error | mean error | worst |\n|---|---|---|---|---|")
    everything = [one for some in errors.values() for one in some]
    for name, some in [*errors.items(), ("all", everything)]:
        relative = [math.exp(one) - 1 for one in some]
        mean = sum(map(abs, relative)) / len(some)
        worst = max(relative, key=abs)
        print(f"| {name} | {len(some)} | {mean:.1%} | {sum(relative) / len(some):+.1%} | {worst:+.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference")
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--runs", action="store_true", help="print every run")
    options = parser.parse_args()
    runs = published(options.reference)
    shares = start(runs)
    errors: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        errors[run.table].append(error(run, shares))
        if options.runs:
            ours = run.seconds * math.exp(errors[run.table][-1])
            print(f"{run.table:16} {run.name:26} measured {run.seconds:8.2f} s, foreseen {ours:8.2f} s")
    show("table", errors)
    if options.leave_one_out:
        left: dict[str, list[float]] = defaultdict(list)
        for model in dict.fromkeys(run.model for run in runs):
            fitted = fit([run for run in runs if run.model != model], shares)
            for run in runs:
                if run.model == model:
                    left[run.table].append(error(run, fitted))
        show("each model with shares fitted on the others", left)


if __name__ == "__main__":
    main()
