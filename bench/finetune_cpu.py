"""Fine-tuning on a CPU: Ropewalk beside TRL's SFTTrainer with PEFT, on the same examples and model.

    python examples/stdlib_docstrings.py
    python bench/finetune_cpu.py                       # about an hour on two cores
    python bench/finetune_cpu.py --runs 1 --examples 24   # a first look

The recipe (recipes/quickstart.yaml) gives model, rank, targets, learning rate and row length. All sides do
one epoch over the same examples, each in a process of its own, in turn. Tokens are those of the examples:
padding does not count. (Scored tokens differ a little: TRL also scores the line break that the chat
template puts after an answer. The ratio is therefore that of all tokens.) The first step of a run is left
out, on every side. TRL is measured twice: as its documentation sets it up, and with bfloat16 weights,
packing and no recomputation chosen by hand. It runs in an environment of its own, bench/.venv-trl, made on
first use.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from environments import peer_python
from measure import Measurement, interleave, measure, median, table, write_results

from ropewalk.recipe import load_recipe, resolve

BENCH = Path(__file__).resolve().parent
RESOLVE = "import sys; from ropewalk.model import resolve_source; print(resolve_source(sys.argv[1]))"


def main() -> None:
    options = _options()
    recipe = resolve(load_recipe(options.recipe)).recipe.model_dump(mode="json")
    model = subprocess.run(
        [sys.executable, "-c", RESOLVE, recipe["model"]["source"]], check=True, capture_output=True, text=True
    ).stdout.strip()
    python = {"ropewalk": Path(sys.executable)}
    if any(side.startswith("trl") for side in options.sides):
        python["trl"] = peer_python("trl", options.environments)
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as folder:
        data = Path(folder, "examples.jsonl")
        data.write_text("\n".join(_examples(options.data, options.examples)) + "\n", encoding="utf-8")
        sides = {
            side: _side(side, recipe, model, data, Path(folder), python, options.threads)
            for side in options.sides
        }
        measurements = interleave(options.runs, sides)
    summary = _summary(measurements, options.sides)
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("out", "environments")
    }
    write_results(options.out, measurements, settings, summary)
    print(_report(summary), f"\nwritten to {options.out}", sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data/stdlib-docstrings/train.jsonl"))
    parser.add_argument(
        "--examples", type=int, default=192, help="how many of the data's rows, chosen by seed"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sides", nargs="+", default=["ropewalk", *TRL], choices=["ropewalk", *TRL])
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "finetune_cpu.json")
    parser.add_argument("--environments", type=Path, default=BENCH, help="folder for the peers' environments")
    return parser.parse_args()


def _examples(path: Path, count: int) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return random.Random(0).sample(lines, min(count, len(lines)))


TRL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # nothing set: TRL's own choice is bfloat16 autocast, recomputed activations, batches of 8 examples
    "trl": lambda recipe: {},
    "trl-by-hand": lambda recipe: {
        "model_init_kwargs": {"dtype": "bfloat16"},
        "packing": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": recipe["train"]["batch_size"],
    },
}


def _side(
    side: str,
    recipe: dict[str, Any],
    model: str,
    data: Path,
    folder: Path,
    python: dict[str, Path],
    threads: int,
) -> Callable[[], Measurement]:
    """A call that measures one run of the side."""
    tool = side.partition("-")[0]
    job = folder / f"{side}.json"
    content = _our_job(recipe, model, data, folder, threads) if tool == "ropewalk" else None
    job.write_text(json.dumps(content or _trl_job(side, recipe, model, data, folder)))
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    return partial(measure, side, [python[tool], BENCH / "sides" / f"{tool}_sft.py", job], environment)


def _our_job(recipe: dict[str, Any], model: str, data: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The recipe on these examples, with nothing measured beside training."""
    changed = {
        "model": recipe["model"] | {"source": model, "tokenizer": None},
        "data": recipe["data"]
        | {"train": [{"path": str(data)}], "validation": [], "validation_fraction": 0.0}
        | {"directory": str(folder / "prepared")},
        "train": recipe["train"]
        | {"epochs": 1, "steps": None, "tokens": None, "threads": threads, "log_every": 1},
        "evaluate": {},
        "runs": str(folder / "runs"),
    }
    return {"recipe": recipe | changed}


def _trl_job(side: str, recipe: dict[str, Any], model: str, data: Path, folder: Path) -> dict[str, Any]:
    targets = recipe["adapt"]["targets"]
    return {
        "model": model,
        "data": str(data),
        "output": str(folder / side),
        "epochs": 1,
        "seed": recipe["seed"],
        "sequence_length": recipe["data"]["sequence_length"],
        "rank": recipe["adapt"]["rank"],
        "alpha": recipe["adapt"]["alpha"],
        "targets": targets if isinstance(targets, str) else list(targets),
        "learning_rate": recipe["train"]["optimizer"]["learning_rate"],
        "config": TRL[side](recipe),
    }


def _rate(kind: str, measurement: Measurement) -> float:
    """Tokens per second of training, without the first step where there are others."""
    skipped = 1 if len(measurement.result["seconds"]) > 1 else 0
    return sum(measurement.result[kind][skipped:]) / sum(measurement.result["seconds"][skipped:])


def _summary(measurements: list[Measurement], sides: list[str]) -> list[dict[str, Any]]:
    """Medians of each side, and the first side's advantage over it."""
    rows = []
    for side in sides:
        of = partial(median, measurements, side)
        rows.append(
            {
                "side": side,
                "tokens_per_second": of(partial(_rate, "tokens")),
                "scored_tokens_per_second": of(partial(_rate, "scored_tokens")),
                "peak_bytes": of(lambda m: m.peak_bytes),
                "process_seconds": of(lambda m: m.seconds),
                "processor_seconds": of(lambda m: m.processor_seconds),
                "steps": of(lambda m: len(m.result["seconds"])),
                "tokens": of(lambda m: sum(m.result["tokens"])),
                "scored_tokens": of(lambda m: sum(m.result["scored_tokens"])),
                "last_loss": of(lambda m: m.result["losses"][-1]),
            }
        )
    for row in rows:
        row["speed_ratio"] = rows[0]["tokens_per_second"] / row["tokens_per_second"]
        row["memory_ratio"] = rows[0]["peak_bytes"] / row["peak_bytes"]
    return rows


def _report(summary: list[dict[str, Any]]) -> str:
    first = summary[0]["side"]
    header = [
        "",
        "tokens/s",
        "scored tokens/s",
        "peak MB",
        "process s",
        "processor s",
        "steps",
        "tokens",
        "scored",
        "last loss",
    ]
    header += [f"{first} is x as fast", "in x its memory"]
    rows = [
        [
            row["side"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['scored_tokens_per_second']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['process_seconds']:.0f}",
            f"{row['processor_seconds']:.0f}",
            f"{row['steps']:.0f}",
            f"{row['tokens']:.0f}",
            f"{row['scored_tokens']:.0f}",
            f"{row['last_loss']:.3f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in summary
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
