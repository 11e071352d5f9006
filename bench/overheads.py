"""What a run spends beside its steps: waiting for data, logging, the self-check, compiling.

    python examples/stdlib_docstrings.py
    python bench/overheads.py                  # the quickstart twice with compiled blocks, once without

Shares are of the time in training steps, from the run's own metrics; a logging call is timed by itself. The
first compiled run begins with an empty cache, the second finds what the first one left.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import as_json, machine, table

from ropewalk.track import RunDirectory

BENCH = Path(__file__).resolve().parent


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as folder:
        plain = _run(options, Path(folder), "false")
        cold = _run(options, Path(folder), "true")
        warm = _run(options, Path(folder), "true")
        logging = _logging(Path(folder))
    rows = {
        "waiting for data, share of the steps": f"{plain['data_wait'] / plain['steps']:.4%}",
        "self-check, seconds": f"{plain['self_check']:.2f}",
        "self-check, share of the steps": f"{plain['self_check'] / plain['steps']:.2%}",
        "one logging call, median microseconds": f"{logging * 1e6:.1f}",
        "compiling, empty cache, seconds": f"{cold['compile']:.1f}",
        "compiling, from the cache, seconds": f"{warm['compile']:.1f}",
        "tokens/s, plain": f"{plain['rate']:.0f}",
        "tokens/s, compiled": f"{warm['rate']:.0f}",
    }
    print(table(["", "measured"], [[name, value] for name, value in rows.items()]))
    content = {"machine": machine(), "steps": options.steps, "measured": rows}
    options.out.write_text(as_json(content), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "overheads.json")
    return parser.parse_args()


def _run(options: argparse.Namespace, folder: Path, compiled: str) -> dict[str, Any]:
    """One run in a process of its own: seconds of each part, and its rate after the first step."""
    runs = folder / f"runs-{time.time()}"
    fields = {
        "runs": runs,
        "train.steps": options.steps,
        "train.threads": options.threads,
        "train.log_every": 1,
        "train.compile": compiled,
        "train.evaluate_rows": 1,
    }
    words = [f"{name}={value}" for name, value in fields.items()]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    command = [str(Path(sys.executable).with_name("ropewalk")), "train", str(options.recipe), *words]
    subprocess.run(command, check=True, env=environment)
    (run,) = runs.iterdir()
    records = [json.loads(line) for line in (run / "metrics-train.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    later = steps[1:] or steps
    seconds = {record["kind"]: record["seconds"] for record in records if "seconds" in record}
    return {
        "steps": sum(record["seconds"] for record in steps),
        "data_wait": sum(record["data_wait_seconds"] for record in steps),
        "rate": sum(r["tokens"] for r in later) / sum(r["seconds"] for r in later),
        "self_check": seconds.get("self_check", 0.0),
        "compile": seconds.get("compile", 0.0),
    }


def _logging(folder: Path) -> float:
    """Median seconds of a call with a record of a step's size."""
    run = RunDirectory.create(str(folder / "logs"), "log", "name: log\n", {})
    record = {"kind": "train", "step": 1} | {f"field_{i}": 1.0 / (i + 3) for i in range(18)}
    taken = []
    for _ in range(3000):
        began = time.perf_counter()
        run.log(record)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
