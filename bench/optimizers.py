"""What an update costs: time and bytes per parameter of each optimizer and way of keeping its numbers.

    python bench/optimizers.py [--runs 3] [--threads 1] [--out bench/results/optimizers-cpu.json]

A model of about 30 million bfloat16 parameters in the shapes of a Llama; its gradients are random and given,
so that only taking them over, their norm and the update are timed. Every side has its own process; all are
run in turn. Bytes are those that weights, masters, states and gradients hold when the last gradient has come
(a peak of the process would count the import of torch). The fastest of all updates is the figure to compare
where the machine is not quiet.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import MARK, interleave, measure, median, table, write_results

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 512, 1408, 8, 8192
SIDES: dict[str, dict] = {
    "adamw, float32 weights": {"dtype": "float32"},
    "adamw, masters": {},
    "adamw, masters, in backward": {"in_backward": True},
    "adamw, masters, 8 bits": {"state_bits": 8},
    "adamw, masters, 4 bits": {"state_bits": 4},
    "adamw, stochastic": {"masters": False},
    "adamw, stochastic, 8 bits": {"masters": False, "state_bits": 8},
    "adamw, stochastic, 4 bits": {"masters": False, "state_bits": 4},
    "adamw, stochastic, 8 bits, in backward": {"masters": False, "state_bits": 8, "in_backward": True},
    "lion, masters": {"name": "lion", "betas": (0.9, 0.99)},
    "lion, stochastic, 8 bits": {
        "name": "lion",
        "betas": (0.9, 0.99),
        "masters": False,
        "state_bits": 8,
    },
    "muon, masters": {"name": "muon", "betas": (0.95, 0.95)},
    "adafactor, masters": {"name": "adafactor"},
    "adafactor, stochastic": {"name": "adafactor", "masters": False},
    "adafactor, stochastic, in backward": {"name": "adafactor", "masters": False, "in_backward": True},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--runs", type=int, default=3, help="processes of each side, in turn")
    arguments.add_argument("--steps", type=int, default=8, help="timed updates in each process, after two")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path, help="where all of it goes as JSON")
    arguments.add_argument("--side", choices=SIDES, help="only this one, here (what the processes run)")
    options = arguments.parse_args()
    if options.side:
        print(MARK + json.dumps(run(SIDES[options.side], options.steps)))
        return

    def start(side: str):  # type: ignore[no-untyped-def]
        command = [sys.executable, __file__, "--side", side, "--steps", options.steps]
        return lambda: measure(side, command, {"OMP_NUM_THREADS": str(options.threads)})

    done = interleave(options.runs, {side: start(side) for side in SIDES})
    rows = []
    for side in SIDES:
        typical, held, after = (
            median(done, side, lambda m, key=key: m.result[key])
            for key in ("nanoseconds", "bytes_with_gradients", "bytes_after")
        )
        fastest = min(m.result["fastest_nanoseconds"] for m in done if m.side == side)
        rows.append((side, f"{fastest:.1f}", f"{typical:.1f}", f"{held:.2f}", f"{after:.2f}"))
    header = ("per parameter", "fastest ns", "median ns", "bytes with gradients", "bytes after")
    print(table(header, rows))
    if options.out:
        settings = {"runs": options.runs, "steps": options.steps, "threads": options.threads}
        write_results(options.out, done, settings, [dict(zip(header, row, strict=True)) for row in rows])


def run(side: dict, steps: int) -> dict[str, float]:
    """Times of the steps and bytes after them, per parameter."""
    import torch

    from ropewalk.train.optim import Optimizer, OptimizerConfig

    settings = dict(side)
    model = make_model().to(getattr(torch, settings.pop("dtype", "bfloat16")))
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.1, **settings))
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    weights = sum(p.nbytes for p in parameters)
    gradients = [torch.randn_like(p) * 0.01 for p in parameters]
    seconds, held = [], 0
    for _ in range(steps + 2):
        given = [gradient.clone() for gradient in gradients]
        began = time.perf_counter()
        optimizer.begin(1e-4)
        while given:  # one by one from the end, as backward makes them
            torch.autograd.backward(parameters[len(given) - 1], given.pop())
        float(optimizer.gradient_norm())
        waited = time.perf_counter()
        held = optimizer.state_bytes()
        waited = time.perf_counter() - waited
        optimizer.step(1e-4)
        seconds.append(time.perf_counter() - began - waited)
    return {
        "parameters": count,
        "nanoseconds": statistics.median(seconds[2:]) / count * 1e9,
        "fastest_nanoseconds": min(seconds[2:]) / count * 1e9,
        "bytes_with_gradients": (weights + held) / count,
        "bytes_after": (weights + optimizer.state_bytes()) / count,
    }


def make_model():  # type: ignore[no-untyped-def]
    from torch import nn

    blocks = [
        nn.ModuleList(
            [nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)]
            + [nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2)]
            + [nn.Linear(INTERMEDIATE, HIDDEN, bias=False), nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)]
        )
        for _ in range(LAYERS)
    ]
    return nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, HIDDEN), "blocks": nn.ModuleList(blocks)})


if __name__ == "__main__":
    main()
