"""linear_cross_entropy against the plain loss (all logits at once, softmax in float32 as in transformers).

    python bench/loss.py [--hidden 2048 1024] [--rows 8192] [--vocab 128256] [--runs 3] [--threads N]

Each run is a process of its own; the sides take turns. Memory is the peak resident memory beyond the inputs
and the returned gradients. Bars: less than 400 MB, and no slower than the plain path, which takes 15 GB.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from measure import MARK, Measurement, interleave, measure, median, table, write_results

HERE = Path(__file__).resolve().parent
SIDES = ("ropewalk", "plain")
BAR_BYTES = 400_000_000


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (most, since it was reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def side(name: str, rows: int, hidden_size: int, vocab: int, repeats: int) -> None:
    """Measures one side in this process and prints its result."""
    import torch
    import torch.nn.functional as F

    from ropewalk.ops import linear_cross_entropy

    def loss(hidden, weight, labels):
        if name == "ropewalk":
            return linear_cross_entropy(hidden, weight, labels)
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def draw(n, size, scale):
        return torch.empty(n, size, dtype=torch.bfloat16).normal_(0, scale).requires_grad_()

    torch.manual_seed(0)
    hidden, weight = draw(rows, hidden_size, 1.0), draw(vocab, hidden_size, 0.02)
    labels = torch.randint(0, vocab, (rows,))
    loss(hidden[:16], weight[:512], labels[:16] % 512).backward()  # the kernels' own buffers
    hidden.grad = weight.grad = None
    seconds = []
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        value = loss(hidden, weight, labels)
        value.backward()
        seconds.append(time.perf_counter() - start)
    returned = hidden.grad.nbytes + weight.grad.nbytes
    result = {
        "seconds": min(seconds),
        "extra_bytes": resident("VmHWM") - before - returned,
        "loss": value.item() / rows,
        "gradient_norm": weight.grad.norm(dtype=torch.float32).item(),
    }
    print(MARK + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 1024])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="within a process; the fastest counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "loss-cpu.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side(given.side, given.rows, given.hidden[0], given.vocab, given.repeats)
        return
    rows, summary, done = [], [], []
    for hidden in given.hidden:

        def run(name: str, hidden: int = hidden) -> Measurement:
            sizes = [f"--{k}={v}" for k, v in vars(given).items() if k in ("rows", "vocab", "repeats")]
            command = [sys.executable, __file__, "--side", name, "--hidden", str(hidden), *sizes]
            return measure(name, command, {"OMP_NUM_THREADS": str(given.threads)})

        measured = interleave(given.runs, {name: lambda name=name: run(name) for name in SIDES})
        done += measured
        ours, plain = (
            {k: median(measured, s, lambda m, k=k: m.result[k]) for k in measured[0].result} for s in SIDES
        )
        drift = abs(ours["loss"] / plain["loss"] - 1), abs(ours["gradient_norm"] / plain["gradient_norm"] - 1)
        if not ours["gradient_norm"] or max(drift) > 0.01:
            raise SystemExit(f"the sides do not compute the same: {ours} and {plain}")
        summary.append(
            {
                "hidden": hidden,
                "seconds": {"ropewalk": ours["seconds"], "plain": plain["seconds"]},
                "speed_ratio": plain["seconds"] / ours["seconds"],
                "extra_bytes": {"ropewalk": ours["extra_bytes"], "plain": plain["extra_bytes"]},
                "within_bars": ours["extra_bytes"] < BAR_BYTES and ours["seconds"] <= plain["seconds"],
            }
        )
        for name, result in (("ropewalk", ours), ("plain", plain)):
            rows.append(
                (f"{name}, {hidden}", f"{result['seconds']:.2f}", f"{result['extra_bytes'] / 1e6:,.0f}")
            )
    print(table(("side, hidden size", "seconds", "MB beyond"), rows))
    settings = {k: v for k, v in vars(given).items() if k not in ("side", "out")}
    write_results(given.out, done, settings, summary)


if __name__ == "__main__":
    main()
