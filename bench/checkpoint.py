"""How long a step waits for a checkpoint: written while the run waits, and while training goes on.

    python bench/checkpoint.py [--shape smollm2-135m] [--processes 2] [--out bench/results/checkpoint.json]

Full training in float32 with AdamW, on few tokens. In one run, by turns: a step alone, a save that is waited
for, and one that is not, with a step beside it. Medians, without the first of each, which allocates. The disk
counts: TMPDIR says which one it is.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import closing
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
    arguments.add_argument("--rounds", type=int, default=6)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--side", type=Path, help="the folder of the run, here (what the processes do)")
    options = arguments.parse_args()
    if options.side:
        return _run(options.side)
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as folder:
        rounds = _measured(options, Path(folder))
    seconds = {name: statistics.median(r[name] for r in rounds[1:]) for name in rounds[0]}
    print(table(["median", "seconds"], [[name, f"{value:.2f}"] for name, value in seconds.items()]))
    share = seconds["a step waits for it"] / seconds["a save that is waited for"]
    print(f"a step waits {share:.1%} of the time")
    if options.out:
        how = {"shape": options.shape, "processes": options.processes, "threads": options.threads}
        content = {"machine": machine(), **how, "median_seconds": seconds, "share": share, "rounds": rounds}
        options.out.write_text(as_json(content), encoding="utf-8")


def _measured(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    config = SHAPES[options.shape]
    write_model(folder / "model", config, weights=False, seed=0)
    synthetic_documents(folder, config["vocab_size"], 64, LENGTH, seed=0)
    recipe = {
        "name": "checkpoint",
        "runs": str(folder / "runs"),
        "model": {"config": config, "tokenizer": str(folder / "model")},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "validation_fraction": 0.0,
            "sequence_length": LENGTH,
            "directory": str(folder / "prepared"),
        },
        "train": {
            "steps": 2 * options.rounds + 1,
            "batch_size": 2,
            "device": "cpu",
            "threads": options.threads,
            "precision": "float32",
            "self_check": False,
        },
        "parallel": {"shard": options.processes},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    if launch([str(Path(__file__)), "--side", str(folder)], options.processes):
        raise SystemExit("a process failed")
    rounds: list[dict[str, float]] = json.loads((folder / "rounds.json").read_text())
    return rounds


def _run(folder: Path) -> None:
    import ropewalk as rw
    from ropewalk.train import entry
    from ropewalk.train.loop import ahead, train_step
    from ropewalk.train.saving import Saver

    def measured(job: Any, run: Any, *_: Any) -> list[float]:
        saver, rounds = Saver(run.checkpoints_path, 1, job.world), []
        job.before_update = saver.settle

        def step(batches: Any) -> float:
            job.step += 1
            return float(train_step(job, batches)["seconds"])

        with closing(ahead(job)) as batches:
            step(batches)
            while job.step < job.steps:
                alone = step(batches)
                job.save(saver, copy=False)
                sync = saver.finish()
                job.world.wait()
                job.save(saver, copy=True)
                beside = step(batches)
                waited = saver._waited
                background = saver.finish()
                job.world.wait()
                assert sync is not None
                assert background is not None
                rounds.append(
                    {
                        "a save that is waited for": sync.seconds,
                        "a step waits for it": waited,
                        "a save while training goes on": background.seconds,
                        "a step": alone,
                        "a step beside a save": beside,
                    }
                )
        if job.world.first:
            (folder / "rounds.json").write_text(json.dumps(rounds))
        return [0.0]

    entry.run_loop = measured
    rw.train(json.loads((folder / "recipe.json").read_text()), progress=False)


if __name__ == "__main__":
    main()
