"""Every layout trains what one process trains: the same losses, gradient norms and weights.

Runs of one number of processes share them, so that the whole table costs their start-up once.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "tie_word_embeddings": True},
    "gemma2": SIZES | {"model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 40,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 384,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3": SIZES | {"model_type": "qwen3", "attention_bias": True},
    "deep": SIZES | {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 5},
    "deep-untied": SIZES | {"model_type": "qwen3", "num_hidden_layers": 5},
    "wide": SIZES
    | {"model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8}
    | {"head_dim": 16},
    "qwen3_moe": SIZES
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "router_aux_loss_coef": 0.01},
}
FAMILIES["sparse"] = (
    FAMILIES["qwen3_moe"] | {"num_experts": 32, "num_experts_per_tok": 1} | {"num_hidden_layers": 4}
)
"""Many of its experts get no token of a micro-batch in one process, and some in the other."""
SPLIT = {"pipeline_schedule": "interleaved-zb"}
ONE_RUN = SPLIT | {"pipeline_stages": 1}
INTERLEAVED, ZBV = {"pipeline_schedule": "interleaved-1f1b"}, {"pipeline_schedule": "zbv"}
LAYOUTS = {
    2: {
        "stage 3": {"shard": 2},
        "stage 2": {"shard": 2, "stage": 2},
        "stage 1": {"shard": 2, "stage": 1},
        "replicated": {"replicate": 2, "shard": 1},
        "tensor": {"tensor": 2},
        "context": {"context": 2},
        "context, ring": {"context": 2, "context_exchange": "ring"},
        "context, ulysses": {"context": 2, "context_exchange": "ulysses"},
        "pipeline": {"pipeline": 2},
    },
    4: {
        "tensor 2 x shard 2": {"tensor": 2, "shard": 2},
        "context 4, ring": {"context": 4, "context_exchange": "ring"},
        "context 2 x shard 2": {"context": 2, "shard": 2},
        "context 2 x replicate 2": {"context": 2, "replicate": 2, "context_exchange": "ring"},
        "context 2 x tensor 2": {"context": 2, "tensor": 2},
        "tensor 2 x replicate 2": {"tensor": 2, "replicate": 2, "shard": 1},
        "stage 3": {"shard": 4},
        "hybrid": {"replicate": 2, "shard": 2},
        "replicated": {"replicate": 4, "shard": 1},
        "pipeline 4": {"pipeline": 4},
        "pipeline 2 x shard 2": {"pipeline": 2, "shard": 2},
        "pipeline 2 x shard 2, stage 2": {"pipeline": 2, "shard": 2, "stage": 2},
        "pipeline 2 x shard 2, stage 1": {"pipeline": 2, "shard": 2, "stage": 1} | ZBV,
        "pipeline 2 x shard 2, interleaved": {"pipeline": 2, "shard": 2, "stage": 1} | INTERLEAVED,
        "pipeline 2 x shard 2, gpipe": {"pipeline": 2, "shard": 2, "pipeline_schedule": "gpipe"},
        "pipeline 2 x replicate 2": {"pipeline": 2, "replicate": 2, "shard": 1} | INTERLEAVED,
        "pipeline 2 x replicate 2, split": {"pipeline": 2, "replicate": 2, "shard": 1} | SPLIT,
        "pipeline 2 x tensor 2": {"pipeline": 2, "tensor": 2},
        "pipeline 2 x tensor 2, zbv": {"pipeline": 2, "tensor": 2} | ZBV,
        "pipeline 2 x context 2": {"pipeline": 2, "context": 2, "context_exchange": "ring"},
    },
    8: {
        "pipeline 2 x shard 2 x tensor 2": {"pipeline": 2, "shard": 2, "tensor": 2},
        "shard 2 x context 2 x tensor 2": {"shard": 2, "context": 2, "tensor": 2},
    },
}
FIRST_BLOCKS = ["embed.*", "blocks.0.*", "blocks.1.*"]
EXPERTS: dict[int, list[tuple[str, dict[str, Any], str]]] = {
    2: [
        ("qwen3_moe", {"shard": 2, "expert": 2}, ""),
        ("qwen3_moe", {"replicate": 2, "shard": 1, "expert": 2}, ""),
        ("qwen3_moe", {"context": 2, "expert": 2}, ""),
        ("qwen3_moe", {"tensor": 2, "expert": 2}, ""),
        ("qwen3_moe", {"shard": 2, "expert": 2, "stage": 1}, "recomputed"),
        ("qwen3_moe", {"shard": 2, "expert": 2}, "qlora"),
        ("qwen3_moe", {"shard": 2, "expert": 2}, "lora on int8"),
        ("qwen3_moe", {"shard": 2, "expert": 2}, "experts frozen"),
        ("sparse", {"shard": 2, "expert": 2}, ""),
    ],
    4: [
        ("qwen3_moe", {"replicate": 2, "shard": 2, "expert": 2}, ""),
        ("qwen3_moe", {"replicate": 2, "shard": 2, "expert": 4}, ""),
        ("qwen3_moe", {"replicate": 4, "shard": 1, "expert": 2}, ""),
        ("qwen3_moe", {"shard": 4, "expert": 2}, ""),
        ("qwen3_moe", {"shard": 4, "expert": 2}, "qlora"),
        ("qwen3_moe", {"shard": 2, "context": 2, "expert": 2, "stage": 2}, ""),
        ("qwen3_moe", {"shard": 2, "tensor": 2, "expert": 2}, ""),
        ("qwen3_moe", {"shard": 2, "tensor": 2, "expert": 4}, ""),
        ("sparse", {"shard": 4, "expert": -1}, ""),
        ("qwen3_moe", {"pipeline": 2, "shard": 2, "expert": 2}, ""),
        ("qwen3_moe", {"pipeline": 2, "shard": 2, "expert": 2}, "qlora"),
        ("qwen3_moe", {"pipeline": 2, "replicate": 2, "shard": 1, "expert": 2} | ONE_RUN, ""),
        ("sparse", {"pipeline": 2, "tensor": 2, "expert": -1} | ZBV, "recomputed"),
    ],
    8: [
        ("qwen3_moe", {"pipeline": 2, "context": 2, "tensor": 2, "expert": 2}, ""),
        ("qwen3_moe", {"pipeline": 2, "replicate": 2, "shard": 2, "expert": 2}, ""),
        ("sparse", {"pipeline": 2, "shard": 4, "expert": 2, "stage": 1} | SPLIT, ""),
    ],
}
"""Family, layout and variant: experts divided inside of, and over, what shares the rest of a model; and, of
the blocks that each process of a pipeline has, inside of its stages."""
ALL_BEFORE = ("embed.*", "blocks.0.attention*", "blocks.0.mlp_norm.*", "blocks.0.mlp.router.*")
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"train": {"checkpointing": "full"}},
    "in backward": {"train": {"micro_batch_size": None, "clip": 0.0, "optimizer.in_backward": True}},
    "lora": {"adapt": {"method": "lora", "rank": 4}},
    "qlora": {"adapt": {"method": "lora", "rank": 4, "quantize": "nf4"}},
    "lora on int8": {"adapt": {"method": "lora", "rank": 4, "quantize": "int8"}},
    "frozen": {"adapt": {"freeze": ["embed.*", "blocks.0.*"]}},
    # nothing is trained before the experts of block 0, nor the half of the experts that one process has
    "experts frozen": {
        "adapt": {"freeze": [*ALL_BEFORE, "blocks.*.mlp.experts.0.*", "blocks.*.mlp.experts.1.*"]}
    },
    "lion": {"train": {"optimizer.name": "lion"}},
}
"""Of llama at stage 3, over two processes; and, but for lion, of a wider one with divided products."""
DENSE = [name for name in VARIANTS if name != "experts frozen"]


ALSO = {
    "gemma2": ("stage 3", "replicated", "tensor", "context", "context, ring", "pipeline"),
    "gpt2": ("stage 3", "replicated", "tensor", "context", "pipeline"),
    "qwen3": ("tensor", "pipeline"),
    "qwen3_moe": ("stage 3", "replicated", "tensor", "context", "pipeline"),
    "sparse": ("stage 3", "replicated"),
    "deep": (),
    "deep-untied": (),
    "wide": (),
}
"""Layouts of the families beside llama, which is trained in all of them."""


@pytest.fixture(scope="module")
def recipes(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path
) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    draw = random.Random(5)
    words = "rope walk fibre strand twist long building loose strong spin lay yarn hemp tar".split()
    rows = [" ".join(draw.choices(words, k=draw.choice((3, 5, 8, 13, 21)))) for _ in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    bases: dict[str, str] = {}

    def make(
        family: str,
        layout: dict[str, Any] | None = None,
        adapt: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        seed: int = 1,
    ) -> dict[str, Any]:
        said = layout or {}
        groups = said.get("replicate", 1) * said.get("shard", 1)
        # two passes a step in every process, in pipelines more; a mixture's balance is of one pass's rows
        rows = 1 if "pipeline" in said or "num_experts" in FAMILIES[family] else max(1, 4 // groups)
        fields: dict[str, Any] = {"steps": 5, "batch_size": 8, "micro_batch_size": rows, "threads": 1}
        fields |= {"device": "cpu", "precision": "float32", "optimizer": {"learning_rate": 3e-3}}
        for name, value in (train or {}).items():
            section, _, key = name.rpartition(".")
            (fields[section] if section else fields)[key] = value
        scratch = {"config": FAMILIES[family], "tokenizer": str(tiny_tokenizer_dir)}
        if adapt and family not in bases:
            bases[family] = _base(make(family), folder / family)
        return {
            "name": family,
            "seed": seed,
            "runs": str(folder / "runs"),
            "model": {"source": bases[family]} if adapt else scratch,
            "data": {
                "train": [{"path": str(folder / "rows.jsonl")}],
                "validation_fraction": 0.1,
                "sequence_length": 64,
                "directory": str(folder / "prepared"),
                "workers": 1,
            },
            "adapt": adapt or {},
            "train": fields,
            "parallel": layout or {},
        }

    return make


def _base(recipe: dict[str, Any], path: Path) -> str:
    """A model to adapt, on disk."""
    recipe["train"] |= {"steps": 1}
    run = rw.train(recipe, progress=False)
    (run.checkpoint / "model").rename(path)
    return str(path)


def trace(run: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in (Path(run) / "metrics-train.jsonl").read_text().splitlines()]
    return [(r["loss"], r["gradient_norm"]) for r in records if r["kind"] == "train"]


def said(run: Path, word: str) -> list[str]:
    """Lines of the report with a word: so many parameters are trained, in any layout."""
    return [line for line in (Path(run) / "report.md").read_text().splitlines() if word in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (Path(run) / "checkpoints").glob("step-00000005")
    (file,) = (checkpoint / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_training(found: dict[str, Any], alone: Any) -> None:
    losses, wanted = trace(found["run"]), trace(alone.run)
    assert len(losses) == len(wanted) == 5
    for (loss, norm), (other, other_norm) in zip(losses, wanted, strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
    assert found["validation_after"] == pytest.approx(alone.validation_after, rel=1e-5)
    assert said(found["run"], "| trained |") == said(alone.run, "| trained |") != []
    ours, theirs = weights(found["run"]), weights(alone.run)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # AdamW's first steps are signs of gradients: where one is almost zero, its rounding is seen
        assert (ours[name] - theirs[name]).abs().max() < 2e-3, name
        assert torch.linalg.norm(ours[name] - theirs[name]) < 1e-3 * torch.linalg.norm(theirs[name]), name


def note(processes: int, layout: dict[str, Any], what: str, found: dict[str, Any], alone: Any) -> None:
    """A row of the table in docs/parallelism.md, where parity_table.py asks for it."""
    if path := os.environ.get("ROPEWALK_PARITY_ROWS"):
        pairs = list(zip(trace(found["run"]), trace(alone.run), strict=True))
        worst = [max(abs(mine[i] - other[i]) / other[i] for mine, other in pairs) for i in (0, 1)]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([processes, layout, what, *worst]) + "\n")


PIPELINES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpipe": ("deep", {"pipeline_schedule": "gpipe"}, {}),
    "interleaved-1f1b": ("deep", INTERLEAVED, {}),
    "interleaved-zb": ("deep", {"pipeline_schedule": "interleaved-zb"}, {}),
    "zbv": ("deep", ZBV, {}),
    "zbv, untied": ("deep-untied", ZBV, {}),
    "moe, interleaved-zb": ("qwen3_moe", {"pipeline_schedule": "interleaved-zb", "pipeline_stages": 1}, {}),
    "recomputed": ("deep", {}, {"train": {"checkpointing": "full", "verify_every": 2}}),
    "recomputed, zbv": ("deep", ZBV, VARIANTS["recomputed"]),
    "selective": ("deep", {}, {"train": {"checkpointing": "selective"}}),
    "lora, zbv": ("deep", ZBV, VARIANTS["lora"]),
    "qlora": ("deep", {}, VARIANTS["qlora"]),
    "lora on int8": ("deep", {}, VARIANTS["lora on int8"]),
    "frozen": ("deep", {"pipeline_schedule": "interleaved-zb"}, {"adapt": {"freeze": FIRST_BLOCKS}}),
}
"""Over two processes: family, schedule, what is trained how."""


def test_pipelines_of_two_processes_train_what_one_trains(recipes, train_in) -> None:  # type: ignore[no-untyped-def]
    calls = {
        name: ("train", [recipes(family, {"pipeline": 2} | schedule, **fields), [], False])
        for name, (family, schedule, fields) in PIPELINES.items()
    }
    runs = train_in(2, calls)
    alone: dict[str, Any] = {}
    for name, (family, schedule, fields) in PIPELINES.items():
        key = json.dumps([family, fields])
        if key not in alone:
            alone[key] = rw.train(recipes(family, **fields), progress=False)
        assert_same_training(runs[name], alone[key])
        kinds = ("recomputed", "lora on int8", "lora", "qlora", "frozen")
        what = next((word for word in kinds if name.startswith(word)), "")
        note(2, {"pipeline": 2} | schedule, f"{family}, {what}".removesuffix(", "), runs[name], alone[key])


def test_two_processes_train_what_one_trains(recipes, train_in) -> None:  # type: ignore[no-untyped-def]
    layout_names = LAYOUTS[2].keys()
    cases = {
        f"{family}, {name}": (family, layout, {})
        for family in FAMILIES
        for name, layout in LAYOUTS[2].items()
        if name in ALSO.get(family, layout_names)
    }
    cases |= {f"llama, {name}": ("llama", {"shard": 2}, VARIANTS[name]) for name in DENSE}
    in_part = {"method": "dora", "rank": 2, "targets": ["q_proj"]}  # of a matrix that gpt2 stores as one
    cases["gpt2, dora in part"] = ("gpt2", {"shard": 2}, {"adapt": in_part})
    for name in ("qlora", "lora on int8"):
        cases[f"llama, {name}, replicated"] = ("llama", {"replicate": 2, "shard": 1}, VARIANTS[name])
    cases |= {
        f"wide, {name}, tensor": ("wide", {"tensor": 2}, VARIANTS[name]) for name in DENSE if name != "lion"
    }
    ring = {"context": 2, "context_exchange": "ring"}
    cases |= {
        f"llama, {name}, context": ("llama", ring, VARIANTS[name])
        for name in ("recomputed", "in backward", "qlora")
    }
    calls = {
        name: ("train", [recipes(family, layout, **fields), [], False])
        for name, (family, layout, fields) in cases.items()
    }
    runs = train_in(2, calls)
    alone: dict[str, Any] = {}
    for name, (family, layout, fields) in cases.items():
        key = json.dumps([family, fields])
        if key not in alone:
            alone[key] = rw.train(recipes(family, **fields), progress=False)
        assert_same_training(runs[name], alone[key])
        variant = next((v for v, its in VARIANTS.items() if its == fields), "")
        note(2, layout, f"{family}, {variant}".removesuffix(", "), runs[name], alone[key])


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_divided_experts_are_trained_as_one_process_trains_them(processes, recipes, train_in):  # type: ignore[no-untyped-def]
    cases = EXPERTS[processes]
    fields = {name: VARIANTS.get(name, {}) for _, _, name in cases}
    if processes < 8:
        fields = {
            name: some | {"train": some.get("train", {}) | {"batch_size": 4}} for name, some in fields.items()
        }
    calls = {
        f"case {number}": ("train", [recipes(family, layout, **fields[variant]), [], False])
        for number, (family, layout, variant) in enumerate(cases)
    }
    runs = train_in(processes, calls)
    alone: dict[tuple[str, str], Any] = {}
    for run, (family, layout, variant) in zip(runs.values(), cases, strict=True):
        if (family, variant) not in alone:
            alone[family, variant] = rw.train(recipes(family, **fields[variant]), progress=False)
        assert_same_training(run, alone[family, variant])
        note(processes, layout, f"{family}, {variant}".removesuffix(", "), run, alone[family, variant])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 8])
def test_more_processes_train_what_one_trains(processes, recipes, train_in):  # type: ignore[no-untyped-def]
    layouts = LAYOUTS[processes]
    deep = {name for name, layout in layouts.items() if "pipeline" in layout}
    families = {name: "deep" if name in deep else "llama" for name in layouts}
    calls = {
        # verified: a step is computed twice, and what replicas hold is compared
        name: recipes(families[name], layout, train={"verify_every": 4} if name in deep else {})
        for name, layout in layouts.items()
    }
    runs = train_in(processes, {name: ("train", [recipe, [], False]) for name, recipe in calls.items()})
    alone = {family: rw.train(recipes(family), progress=False) for family in set(families.values())}
    for name, run in runs.items():
        assert_same_training(run, alone[families[name]])
        note(processes, layouts[name], families[name], run, alone[families[name]])
