"""How long a step waits for a checkpoint: written while the run waits, and while training goes on.

    python bench/checkpoint.py [--shape smollm2-135m] [--processes 2] [--out bench/results/checkpoint.json]

The same run twice: float32 weights and AdamW, full training on few tokens, a checkpoint every so many steps.
In one the host is said to have no memory for a copy, so that every save is waited for. Seconds are from the
run's own metrics, of the second checkpoint on (the first one allocates the memory). The disk counts: say with
TMPDIR which one it is.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import as_json, machine, table
from shapes import SHAPES
from work import synthetic_documents, write_model

from ropewalk.parallel.launch import launch

LENGTH = 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    arguments.add_argument("--processes", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=1, help="of each process")
    arguments.add_argument("--every", type=int, default=8, help="steps between checkpoints")
    arguments.add_argument("--saves", type=int, default=4)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--side", help="the folder of one run, here (what the processes do)")
    options = arguments.parse_args()
    if options.side:
        return _run(Path(options.side))
    sides = {}
    for name in ("waits", "goes on"):
        with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as folder:
            sides[name] = _measured(options, Path(folder), copies=name == "goes on")
    rows = [[name, *(f"{value:.2f}" for value in side.values())] for name, side in sides.items()]
    print(table(["while it is written the run", *next(iter(sides.values()))], rows))
    share = sides["goes on"]["step waits, s"] / sides["waits"]["step waits, s"]
    print(f"a step waits {share:.1%} of the time")
    if options.out:
        content = {"machine": machine(), "shape": options.shape, "sides": sides, "share": share}
        options.out.write_text(as_json(content), encoding="utf-8")


def _measured(options: argparse.Namespace, folder: Path, copies: bool) -> dict[str, float]:
    config = SHAPES[options.shape]
    write_model(folder / "model", config, weights=False, seed=0)
    synthetic_documents(folder, config["vocab_size"], 64, LENGTH, seed=0)
    recipe = {
        "name": "checkpoint",
        "runs": str(folder / "runs"),
        "model": {"config": config, "tokenizer": str(folder / "model")},
        "data": {
            "train": [{"path": str(next(folder.glob("*.jsonl")))}],
            "validation_fraction": 0.0,
            "sequence_length": LENGTH,
            "directory": str(folder / "prepared"),
        },
        "train": {
            "steps": options.every * options.saves + 1,
            "batch_size": 2,
            "device": "cpu",
            "threads": options.threads,
            "precision": "float32",
            "self_check": False,
            "checkpoint_every": options.every,
        },
        "parallel": {"shard": options.processes},
    }
    (folder / "job.json").write_text(json.dumps({"recipe": recipe, "copies": copies}))
    if launch([str(Path(__file__)), "--side", str(folder)], options.processes):
        raise SystemExit("a process failed")
    records = [json.loads(line) for line in next(folder.glob("runs/*/metrics-train.jsonl")).open()]
    return _seconds(records, options.every)


def _seconds(records: list[dict[str, Any]], every: int) -> dict[str, float]:
    saves = [r for r in records if r["kind"] == "checkpoint" and r["step"] % every == 0][1:]
    steps = {r["step"]: r["seconds"] for r in records if r["kind"] == "train"}
    beside = [steps[save["step"] + 1] for save in saves]
    return {
        "step waits, s": statistics.median(save["seconds"] for save in saves),
        "written after, s": statistics.median(save["write_seconds"] for save in saves),
        "next step, s": statistics.median(beside),
        "a step, s": statistics.median(steps.values()),
        "all steps and saves, s": sum(steps.values()) + sum(save["seconds"] for save in saves),
    }


def _run(folder: Path) -> None:
    import ropewalk as rw
    from ropewalk.train import host_memory

    job = json.loads((folder / "job.json").read_text())
    if not job["copies"]:
        host_memory.free_memory = lambda: 0
    rw.train(job["recipe"], progress=False)


if __name__ == "__main__":
    main()
