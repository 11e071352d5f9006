"""The planner's memory against real steps of recipes drawn at random, on a CPU.

    python bench/plan_memory.py [--count 110] [--seed 2]

Every draw has another shape (family, width, heads, layers, vocabulary), method, optimizer, saver, length,
precision and packing. Each tensor of a real step is watched, and the peak compared with what was foreseen;
those that differ by more than 5% are shown. Models are small: fixed costs weigh more than in real ones.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from plan import test_step_memory as cases  # noqa: E402
from ropewalk.model import ModelConfig  # noqa: E402
from ropewalk.plan.step_memory import step_memory  # noqa: E402
from ropewalk.plan.trace import trace_step  # noqa: E402
from ropewalk.plan.work import Work  # noqa: E402

FAMILIES = {
    "llama": cases.LLAMA,
    "gpt2": cases.GPT2,
    "gpt_neox": cases.NEOX,
    "qwen3": cases.QWEN3,
    "olmo2": cases.OLMO2,
    "gemma2": cases.GEMMA2,
    "gemma3_text": cases.GEMMA3,
    "mixtral": cases.MIXTRAL,
}
WHOLE = ("gpt2", "gpt_neox", "olmo2")
"""families here without grouped queries"""
BOUND = 0.05


def shape(draw: random.Random) -> ModelConfig:
    family = draw.choice(list(FAMILIES))
    heads, dim, layers = draw.choice([2, 4, 6, 8]), draw.choice([16, 32, 64]), draw.choice([1, 2, 3, 4, 6])
    groups = heads if family in WHOLE else draw.choice([n for n in (1, 2, heads) if heads % n == 0])
    hidden = draw.choice([128, 192, 256]) if family == "gemma3_text" else heads * dim
    config = replace(
        FAMILIES[family],
        family=family,
        hidden_size=hidden,
        intermediate_size=draw.choice([2, 3, 4]) * hidden // 16 * 16,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
        num_hidden_layers=layers,
        vocab_size=draw.choice([512, 1000, 4096, 16384]),
        tie_word_embeddings=draw.random() < 0.5,
    )
    if config.layer_types:
        kinds = ("sliding_attention", "full_attention")
        config = replace(config, layer_types=tuple(draw.choice(kinds) for _ in range(layers)))
    if config.moe_layers:
        mixtures = tuple(layer for layer in range(layers) if draw.random() < 0.8) or (0,)
        size, chosen = draw.choice([64, 128, 192]), draw.choice([1, 2])
        config = replace(config, moe_layers=mixtures, moe_intermediate_size=size, num_experts_per_tok=chosen)
    return config


def work(draw: random.Random) -> Work:
    config = shape(draw)
    length = draw.choice([128, 256, 384, 512, 1024, 2048])
    fields: dict[str, Any] = {
        "sequence_length": length,
        "micro_batch_size": 1 if length >= 1024 else draw.choice([1, 2, 3, 4]),
        "accumulation": draw.choice([1, 1, 2, 3]),
        "precision": draw.choice(["bfloat16", "bfloat16", "float32"]),
    }
    methods = ["full"] * 3 + ["lora"] * 2 + ["dora", "prompt", "prefix"]
    methods += [] if config.moe_layers else ["bottleneck", "ia3"]
    methods += ["bitfit"] if config.norm == "layer" else []
    method = fields["method"] = draw.choice(methods)
    if method in ("lora", "dora"):
        fields |= {"rank": draw.choice([4, 8, 16, 32]), "dropout": draw.choice([0.0, 0.0, 0.1])}
        if method == "lora" and not config.moe_layers:
            fields["quantize"] = draw.choice(["none", "none", "nf4", "int8"])
        if draw.random() < 0.3:
            fields["targets"] = draw.choice([("q_proj", "v_proj"), ("o_proj",)])
    if method in ("prompt", "prefix"):
        fields["tokens"] = draw.choice([5, 20])
    if method == "full":
        name = fields["optimizer"] = draw.choice(["adamw", "adamw", "lion", "muon", "adafactor"])
        if name == "adamw" and draw.random() < 0.3:
            fields["state_bits"] = draw.choice([8, 4])
        if fields["precision"] == "bfloat16" and draw.random() < 0.3:
            fields["masters"] = False
        if fields["accumulation"] == 1 and draw.random() < 0.2:
            fields["in_backward"] = True
        if draw.random() < 0.2:
            fields["freeze"] = draw.choice([("embed.*",), ("blocks.0.*",), ("*.mlp.*",)])
    saver = draw.choice(["none", "none", "full", "selective", "budget"])
    if saver == "budget":
        fields["checkpointing_budget"] = draw.choice([0.2, 0.5, 0.8])
    else:
        fields["checkpointing"] = saver
        fields["checkpointing_every"] = draw.choice([1, 1, 2, 3]) if saver != "none" else 1
    usual = {"document_length": [40, 96, 200], "scored": [0.1, 0.3, 0.7], "loss_chunk": [64, 256]}
    fields |= {name: draw.choice(values) for name, values in usual.items() if draw.random() < 0.3}
    return Work(config, device="cpu", **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=110)
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # kernels' sums for each thread are counted, and not seen
    draw, errors = random.Random(arguments.seed), []
    plain = vars(Work(cases.LLAMA, device="cpu"))
    for _ in range(arguments.count):
        one = work(draw)
        cases.forget_buffers()
        seen, counted = trace_step(one, fake=False), step_memory(one)
        errors.append(counted.total_bytes / seen.total_bytes - 1)
        if abs(errors[-1]) > BOUND:
            said = {name: value for name, value in vars(one).items() if value != plain[name]}
            said["config"] = one.config.family
            print(f"{errors[-1]:+.1%} of {seen.total_bytes / 2**20:.1f} MiB: {said}", flush=True)
    sizes = sorted(map(abs, errors))
    within, mean = sum(size <= BOUND for size in sizes), sum(sizes) / len(sizes)
    print(f"{len(sizes)} recipes: {within} within {BOUND:.0%}, mean {mean:.1%}, worst {sizes[-1]:.1%}")


if __name__ == "__main__":
    main()
