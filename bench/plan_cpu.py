"""What the planner foresees of this project's own steps on this machine, beside what they take: 20 recipes.

    python bench/plan_cpu.py --out plan.json

Each shape is a model of random weights and a batch of random tokens. A calibration (kept nowhere; two
minutes in a precision, for machines with neighbours), then six rounds of a few steps (forward, backward,
norm, update) of each shape: the fastest counts, in both, since what else the machine does only adds to
them. Memory: see the tests.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ropewalk.model.config import ModelConfig
from ropewalk.plan import Cluster, Work, calibrate, cluster
from ropewalk.plan.calibrate import measured_step
from ropewalk.plan.estimates import point
from ropewalk.plan.here import calibrated


def shape(hidden: int, layers: int, heads: int, inner: int, vocabulary: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


SMALL, MEDIUM = shape(384, 6, 6, 1024, 16384), shape(576, 8, 9, 1536, 49152)
WORKS = [
    *((SMALL, n, 2048 // n, "full", "none", "bfloat16") for n in (128, 512, 1024, 2048)),
    *((SMALL, n, 2048 // n, "lora", "none", "bfloat16") for n in (256, 1024)),
    (SMALL, 4096, 1, "full", "none", "bfloat16"),
    (SMALL, 4096, 1, "lora", "full", "bfloat16"),
    (SMALL, 1024, 2, "full", "full", "bfloat16"),
    (SMALL, 1024, 2, "full", "selective", "bfloat16"),
    *((SMALL, n, 1024 // n, "full", "none", "float32") for n in (128, 1024)),
    (SMALL, 512, 2, "lora", "full", "float32"),
    *((MEDIUM, n, 1024 // n, "full", "none", "bfloat16") for n in (128, 512)),
    *((MEDIUM, n, 1024 // n, "lora", "none", "bfloat16") for n in (256, 1024)),
    (MEDIUM, 512, 2, "lora", "full", "bfloat16"),
    (MEDIUM, 512, 2, "lora", "selective", "bfloat16"),
    (MEDIUM, 512, 2, "qlora", "none", "bfloat16"),
]


PATIENCE, ROUNDS = 120.0, 6
"""Seconds that a calibration may take in a precision, and how often each shape is measured."""


def works() -> Iterator[Work]:
    for config, sequence, rows, method, saver, precision in WORKS:
        quantized = method == "qlora"
        yield Work(
            config,
            sequence_length=sequence,
            micro_batch_size=rows,
            precision=precision,
            method="lora" if quantized else method,
            quantize="nf4" if quantized else "none",
            checkpointing=saver,
            device="cpu",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cpu = torch.device("cpu")
    found = calibrate(cpu, print, PATIENCE)
    plain = cluster(f"{torch.get_num_threads()}x{found.device}")
    fastest: dict[Work, float] = {}
    for work in [*works()] * ROUNDS:
        fastest[work] = min(sum(measured_step(work, cpu)), fastest.get(work, math.inf))
    results = []
    for work, measured in fastest.items():
        where = Cluster(calibrated(plain.accelerator, found, work.precision), 1, 1)
        foreseen = point(work, where).step_seconds
        method = "qlora" if work.quantize == "nf4" else work.method
        size = f"{work.config.hidden_size}x{work.config.num_hidden_layers}"
        rows = f"{work.micro_batch_size}x{work.sequence_length}"
        name = f"{size} {rows} {method} {work.checkpointing} {work.precision}"
        error = foreseen / measured - 1
        results.append({"work": name, "foreseen": foreseen, "measured": measured, "error": error})
        print(f"{name:48} {foreseen:7.3f} {measured:7.3f} s {100 * error:+6.1f}%", flush=True)
    errors = [abs(one["error"]) for one in results]
    near = sum(error <= 0.15 for error in errors)
    mean = sum(errors) / len(errors)
    print(f"mean absolute error {100 * mean:.1f}%; within 15%: {near} of {len(errors)}")
    if options.out:
        text = {"date": time.strftime("%Y-%m-%d"), "rates": str(found.rates), "results": results}
        options.out.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
