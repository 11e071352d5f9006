"""What each saver and speed-up brings: one change at a time, from a plain transformers loop on.

    python bench/ladder.py --device cpu                # SmolLM2-135M's shape; about an hour on two cores
    python bench/ladder.py --device cuda --model llama-3.2-1b --sequence-length 4096
    python bench/ladder.py --device cpu --quick        # does it run at all? (a tiny model)

All rungs train on the same documents, whose lengths are distributed like the quickstart's and of which a
tenth is scored; each in a process of its own, the first step left out. A rung keeps the changes of the one
that it stands on ("after"), and its factors are against that one. A gradient norm of zero fails the run.
MFU is model FLOPs a second over the peak: the FLOPs are those that the mathematics asks for (see
src/ropewalk/train/flops.py: recomputing adds none, padding none, the head counts for scored tokens), and the
peak is the data sheet's dense bfloat16 on a known GPU, else the best of ten products of 2048^3 in
bfloat16 and in float32.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import work
from measure import Measurement, as_json, machine, measure, median, table
from peers import BENCH, OURS, Setting, last_line, nested
from shapes import SHAPES

LENGTHS: dict[str, Any] = {"median": 118, "spread": 0.36, "least": 66, "most": 400, "scored": 0.1}
PLAIN = "transformers loop"


@dataclass(frozen=True)
class Rung:
    """A change of the recipe, by dotted name; `plain`: with the operations' references."""

    name: str
    after: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


COMPILE = {"train.compile": True}
LORA = {"adapt.method": "lora", "adapt.rank": 16}
ONE_PASS = {"train.clip": 0.0, "train.optimizer.in_backward": True}
RUNGS = (
    Rung(PLAIN, None),  # float32, padded batches, full logits, AdamW: see sides/plain_transformers.py
    Rung("Ropewalk, plain operations", PLAIN, plain=True),
    Rung("own operations, chunked loss", "Ropewalk, plain operations"),
    Rung("bfloat16", "own operations, chunked loss", {"train.precision": "bfloat16"}),
    Rung("packing", "bfloat16", {"data.packing": "best_fit", "train.batch_size": 4}),
    Rung("compile", "packing", COMPILE),
    # every weight trained: what the optimizer holds
    Rung("full: 8-bit states", "compile", {"train.optimizer.state_bits": 8}),
    Rung("full: stochastic rounding", "full: 8-bit states", {"train.optimizer.masters": False}),
    Rung("full: in backward", "full: stochastic rounding", ONE_PASS),
    Rung("full: checkpointing full", "full: in backward", {"train.checkpointing": "full"}),
    # LoRA: what is left is the base and the activations
    Rung("LoRA", "compile", LORA),
    Rung("LoRA: NF4 base", "LoRA", {"adapt.quantize": "nf4"}),
    Rung("LoRA: checkpointing full", "LoRA: NF4 base", {"train.checkpointing": "full"}),
    Rung(
        "LoRA: selective instead",  # refused together with compile, which recomputes cheap things itself
        "LoRA: NF4 base",
        {"train.checkpointing": "selective", "train.compile": False},
    ),
)


def main() -> None:
    options = _options()
    rungs = [rung for rung in RUNGS if not options.rung or rung.name in options.rung]
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as temporary:
        folder = options.work or Path(temporary)
        job = prepare(folder, options)
        peak = peak_of(folder, options)
        done: list[Measurement] = []
        failed: dict[str, str] = {}
        for run in range(options.runs):
            for rung in rungs:
                print(f"run {run + 1} of {options.runs}: {rung.name} ...", flush=True)
                try:
                    done.append(climb(rung, job, folder, options))
                except RuntimeError as error:
                    print(f"{rung.name}: {error}", file=sys.stderr)
                    failed[rung.name] = last_line(error)
    rows = factors(rungs, done, failed, peak)
    content = {
        "machine": machine(),
        "settings": {name: getattr(options, name) for name in ("device", "model", "steps", "runs", "threads")}
        | {"sequence_length": options.sequence_length, "lengths": LENGTHS, "quick": options.quick},
        "peak_flops": peak,
        "rungs": rows,
        "measurements": [asdict(run) for run in done],
    }
    name = f"ladder-{options.device}{'-quick' if options.quick else ''}.json"
    out = options.out or BENCH / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(content), encoding="utf-8")
    print(shown(rows), f"\nwritten to {out}", sep="\n")
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rung", action="append", choices=[rung.name for rung in RUNGS], help="default: all")
    parser.add_argument("--set", action=Setting, default={}, metavar="KEY=VALUE", help="for all recipes")
    parser.add_argument("--out", type=Path, help="default: bench/results/ladder-DEVICE.json")
    parser.add_argument("--work", type=Path, help="folder that keeps the work; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="tiny, nothing compiled: shows that it runs")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    options = parser.parse_args()
    if options.quick:
        options.model, options.steps = "tiny", 3
    return options


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The work, and what every rung is told. A step is 16 documents, or as many as 4 packed rows hold."""
    config = SHAPES[options.model]
    folder.mkdir(parents=True, exist_ok=True)
    work.write_model(folder / "model", config, weights=True, seed=0)
    count = 24 * (options.steps + 1)
    work.synthetic_conversations(folder, config["vocab_size"], count, seed=0, **LENGTHS)
    job = {
        "device": options.device,
        "threads": options.threads,
        "seed": 0,
        "model": str(folder / "model"),
        "examples": str(folder / "examples.jsonl"),
        "batch_size": 16,
        "micro_batch_size": 4,
        "steps": options.steps,
        "learning_rate": 2e-5,
    }
    work.write_tokens(folder, nested(_base(folder, options)))
    return job


def _base(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of the first rung of ours: one document a row, float32."""
    return {
        "name": "ladder",
        "runs": str(folder / "runs"),
        "model.source": str(folder / "model"),
        "data.train": [{"path": str(folder / "train.jsonl")}],
        "data.validation_fraction": 0.0,
        "data.sequence_length": options.sequence_length,
        "data.packing": "none",
        "data.directory": str(folder / "prepared"),
        "train.steps": options.steps,
        "train.batch_size": 16,
        "train.micro_batch_size": 4,
        "train.device": options.device,
        "train.precision": "float32",
        "train.threads": options.threads,
        "train.optimizer.learning_rate": 2e-5,
        "train.self_check": False,
    }


def climb(rung: Rung, job: dict[str, Any], folder: Path, options: argparse.Namespace) -> Measurement:
    """One run of a rung. RuntimeError where it fails or learns nothing."""
    changes: dict[str, Any] = {}
    below: Rung | None = rung
    while below is not None:
        changes = below.changes | changes
        below = next((other for other in RUNGS if other.name == below.after), None)
    if options.quick:
        changes |= {"train.compile": False}
    script = OURS.script if rung.name != PLAIN else "plain_transformers.py"
    told = job | {"recipe": nested(_base(folder, options) | changes | options.set), "plain": rung.plain}
    path = folder / "rung.json"
    path.write_text(json.dumps(told))
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run = measure(rung.name, [sys.executable, BENCH / "sides" / script, path], environment, options.timeout)
    norms = run.result["gradient_norms"]
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise RuntimeError(f"{rung.name}: gradient norms are {norms}: it learns nothing")
    return run


def peak_of(folder: Path, options: argparse.Namespace) -> float:
    """FLOP/s of the device in bfloat16: the data sheet's, or measured."""
    path = folder / "peak.json"
    path.write_text(json.dumps({"device": options.device, "threads": options.threads, "seed": 0}))
    run = measure("peak", [sys.executable, BENCH / "sides" / "matmul_peak.py", path])
    return float(run.result["flops_per_s"])


def factors(
    rungs: list[Rung], done: list[Measurement], failed: dict[str, str], peak: float
) -> list[dict[str, Any]]:
    """A row for each rung: medians over its runs, and factors against the rung that it stands on."""
    rows: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        row: dict[str, Any] = {"rung": rung.name, "after": rung.after, "changes": rung.changes}
        rows[rung.name] = row
        if rung.name in failed or not any(run.side == rung.name for run in done):
            row["failed"] = failed.get(rung.name, "not run")
            continue
        for name, value in (
            ("tokens_per_s", lambda run: _per_second(run, "tokens")),
            ("scored_tokens_per_s", lambda run: _per_second(run, "scored_tokens")),
            ("flops_per_s", lambda run: _per_second(run, "flops")),
            ("host_peak_bytes", lambda run: run.peak_bytes),
            ("device_peak_bytes", lambda run: run.result.get("device_peak_bytes", 0)),
            ("gradient_norm", lambda run: run.result["gradient_norms"][0]),
            ("first_step_s", lambda run: run.result["seconds"][0]),
        ):
            row[name] = median(done, rung.name, value)
        row["mfu"] = row["flops_per_s"] / peak
        row["peak_bytes"] = row["device_peak_bytes"] or row["host_peak_bytes"]
        below = rows.get(rung.after or "", {})
        if "tokens_per_s" in below:
            row["speed_factor"] = row["tokens_per_s"] / below["tokens_per_s"]
            row["memory_factor"] = row["peak_bytes"] / below["peak_bytes"]
    return list(rows.values())


def _per_second(run: Measurement, kind: str) -> float:
    """Without the first step. (The plain loop counts no FLOPs: those of its tokens are not printed.)"""
    return float(sum(run.result.get(kind, [0])[1:]) / sum(run.result["seconds"][1:]))


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["rung"], *["-"] * 7, row["failed"][:70]])
            continue
        lines.append(
            [
                row["rung"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['scored_tokens_per_s']:.1f}",
                f"{row['device_peak_bytes'] / 1e6:.0f}" if row["device_peak_bytes"] else "-",
                f"{row['host_peak_bytes'] / 1e6:.0f}",
                f"{row['gradient_norm']:.3g}",
                f"{100 * row['mfu']:.1f} %" if row["mfu"] else "-",
                f"{row['speed_factor']:.2f}" if "speed_factor" in row else "",
                f"{row['memory_factor']:.2f}" if "memory_factor" in row else "",
            ]
        )
    header = ["rung", "tok/s", "scored/s", "device MB", "host MB", "gradient", "MFU", "speed x", "memory x"]
    return table(header, lines)


if __name__ == "__main__":
    main()
