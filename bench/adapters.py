"""What each way of adapting a model costs: training steps of each, in processes of their own, in turn.

    python bench/adapters.py [--runs 3] [--layers 6] [--out FILE.json]

The shape is SmolLM2-135M's with fewer layers (bitfit: qwen2's, which has biases) and random weights, the data
random tokens. A step is forward and backward of 2 rows of 512 tokens in bfloat16, and torch's AdamW on what
is trained. Times are processor time of one thread, which other work on the machine disturbs less; peak memory
is that of the whole process, Python and torch (about 250 MB) included.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measure import MARK, Measurement, interleave, measure, median, table, write_results

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
METHODS = ("full", "lora", "lora+nf4", "lora+int8", "dora", "bottleneck", "ia3", "bitfit", "prefix", "prompt")
STEPS = 5


def build(method: str, layers: int) -> Any:
    """A model in bfloat16, adapted; never in memory twice."""
    import torch

    from ropewalk.adapt import AdapterConfig, apply_adapter, quantize_base
    from ropewalk.model import Transformer, config_from_hf
    from ropewalk.model.init import init_weights

    family = "qwen2" if method == "bitfit" else "llama"
    config = config_from_hf(SHAPE | {"model_type": family, "num_hidden_layers": layers}, "the benchmark")
    with torch.device("meta"):
        model = Transformer(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    init_weights(model, 0)
    name, _, quantized = method.partition("+")
    if quantized:
        quantize_base(model.requires_grad_(False), kind=quantized)  # type: ignore[arg-type]
    if name != "full":
        apply_adapter(model, AdapterConfig(name))
    return model.train()


def step_times(method: str, layers: int) -> dict[str, Any]:
    """Processor seconds of a step (median, the first left out), and how many numbers were trained."""
    import torch

    from ropewalk.ops import linear_cross_entropy

    torch.set_num_threads(1)
    model = build(method, layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(SHAPE["vocab_size"], (2, 512), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        labels = tokens.roll(-1, 1).flatten()
        linear_cross_entropy(model(tokens).flatten(0, 1), model.output_weight, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds[1:]), "trained": sum(p.numel() for p in trained)}


def trained_in_full(method: str) -> int:
    """Numbers trained with all 30 layers, from those of one and of two: all layers are alike."""
    one, two = (
        sum(p.numel() for p in build(method, layers).parameters() if p.requires_grad) for layers in (1, 2)
    )
    return one + 29 * (two - one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method", choices=METHODS, help="do just this, in this process")
    options = parser.parse_args()
    if options.method:
        result = step_times(options.method, options.layers)
        print(MARK + json.dumps(result | {"trained_in_full": trained_in_full(options.method)}))
        return

    def side(method: str) -> Measurement:
        command = [sys.executable, __file__, "--method", method, "--layers", str(options.layers)]
        return measure(method, command)

    done = interleave(options.runs, {method: (lambda m=method: side(m)) for method in METHODS})
    base = median(done, "full", lambda m: m.result["seconds"])
    summary = {
        method: {
            "trained_in_full": next(m.result["trained_in_full"] for m in done if m.side == method),
            "time": median(done, method, lambda m: m.result["seconds"]) / base,
            "peak_bytes": median(done, method, lambda m: m.peak_bytes),
        }
        for method in METHODS
    }
    rows = [
        [method, f"{s['trained_in_full']:,}", f"{s['time']:.2f}", f"{s['peak_bytes'] / 1e6:,.0f} MB"]
        for method, s in summary.items()
    ]
    print(table(["method", "trained (30 layers)", "step / full", "peak memory"], rows))
    if options.out:
        write_results(options.out, done, {"runs": options.runs, "layers": options.layers}, summary)


if __name__ == "__main__":
    main()
