"""Where the time of a training step goes: kernel by kernel, and what a model of all its blocks would take.

    python bench/step_profile.py --device cuda --shape llama-3-8b --rank 16 --rows 2
    python bench/step_profile.py --device cuda --shape llama-3.2-3b --rows 2 --no-masters
    python bench/step_profile.py --device cpu --shape smollm2-135m --rows 1 --length 512 --no-compile

Random weights and tokens, made on the device: nothing is read. Two depths are measured (a few blocks each),
and the difference is what a block takes: what all blocks take follows from it. So a minute shows what loading
a whole model would take long to show; `peers.py` measures that.
"""

import argparse
import statistics
import time

import torch
from shapes import SHAPES, parameters

from ropewalk.adapt import AdapterConfig, apply_adapter
from ropewalk.data import Batch
from ropewalk.model import Transformer, config_from_hf
from ropewalk.train.compiling import compile_blocks
from ropewalk.train.objective import loss_sum
from ropewalk.train.optim import Optimizer, OptimizerConfig


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    found = {depth: measure(depth, options, device) for depth in options.blocks}
    (few, first), (more, second) = found.items()
    each = {name: (second[name] - first[name]) / (more - few) for name in first}
    absent = SHAPES[options.shape]["num_hidden_layers"] - few
    whole = {name: first[name] + absent * each[name] for name in first}
    tokens = options.rows * options.length
    print(
        f"all {absent + few} blocks: forward and backward {whole['pass']:.3f} s, "
        f"{tokens / whole['pass']:.0f} tokens/s; an update {whole['update']:.3f} s; "
        f"at most {whole['bytes'] / 1e9:.1f} GB on the device"
    )


def measure(depth: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass and of an update, and the most bytes that the device held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(depth, options, device)
    optimizer = Optimizer(model, OptimizerConfig(masters=options.masters))
    tokens = torch.randint(0, model.config.vocab_size, (options.rows, options.length))
    positions = torch.arange(options.length).expand(options.rows, -1)
    batch = Batch(tokens, tokens.roll(-1, 1), positions, torch.zeros_like(tokens))

    def both() -> None:
        (loss_sum(model, batch, options.loss_chunk) / tokens.numel()).backward()
        wait(device)

    def clocked(work: object) -> float:
        begun = time.perf_counter()
        work()  # type: ignore[operator]
        return time.perf_counter() - begun

    passes, updates = [], []
    for _ in range(options.runs + 2):
        passes.append(clocked(both))
        updates.append(clocked(lambda: (optimizer.step(1e-5), wait(device))))
    if options.kernels and depth == max(options.blocks):
        show_kernels(both, options.kernels)
        optimizer.discard()
    result = {"pass": statistics.median(passes[2:]), "update": statistics.median(updates[2:]), "bytes": 0.0}
    if device.type == "cuda":
        result["bytes"] = float(torch.cuda.max_memory_allocated())
    print(f"{depth} blocks: {result['pass']:.4f} s and {result['update']:.4f} s (first {passes[0]:.1f} s)")
    return result


def build(depth: int, options: argparse.Namespace, device: torch.device) -> Transformer:
    config = SHAPES[options.shape] | {"num_hidden_layers": depth}
    assert parameters(config)
    with torch.device("meta"):
        model = Transformer(config_from_hf(config, options.shape)).bfloat16()
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    if options.rank:
        adapter = AdapterConfig("lora", options.rank, 2.0 * options.rank, 0.0, "all-linear", False, 0)
        apply_adapter(model, adapter, seed=0)
    if options.compile:
        compile_blocks(model)
    return model.train()


def show_kernels(work: object, count: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()  # type: ignore[operator]
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=count, max_name_column_width=80))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), help="the two depths")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=0, help="LoRA's, on all linear layers; 0: every weight")
    parser.add_argument("--masters", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--loss-chunk", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kernels", type=int, default=20, help="how many are listed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
