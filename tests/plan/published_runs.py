"""The published runs of ../shared/reference as what the planner is asked, and the seconds that were
measured."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ropewalk.layout import Layout
from ropewalk.model.config import ModelConfig
from ropewalk.plan.hardware import Cluster, cluster
from ropewalk.plan.work import Work


@dataclass(frozen=True)
class Run:
    """One row of one table."""

    table: str
    model: str
    name: str
    cluster: Cluster
    work: Work
    seconds: float


def rows(path: Path, count: int | None = None) -> list[dict[str, str]]:
    """Of a table with comments; of `count` rows where others follow."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines[: None if count is None else count + 1]))


def gpt(hidden: int, layers: int, heads: int, vocabulary: int, sequence: int) -> ModelConfig:
    """A plain GPT: LayerNorm, an MLP of four times the width, learned positions, tied head."""
    return ModelConfig(
        family="gpt2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=sequence,
        position="learned",
        norm="layer",
        mlp_gated=False,
        hidden_act="gelu",
        tie_word_embeddings=True,
    )


def pipelined(pipeline: int, stages: int, tensor: int, replicate: int = 1) -> Layout:
    """As Megatron-LM lays out: tensor within a node, stages in turn where a device has several."""
    return Layout(
        pipeline=pipeline,
        pipeline_schedule="interleaved-1f1b" if stages > 1 else "1f1b",
        pipeline_stages=stages,
        tensor=tensor,
        replicate=replicate,
        shard=1,
    )


def megatron_2021(folder: Path) -> Iterator[Run]:
    """arXiv 2104.04473, Table 1. Neither micro-batch nor stages per device are printed: 1 row, and as few
    stages above one as divide the layers. Scores written out, every layer recomputed, no sequence
    parallelism."""
    for row in rows(folder / "sc21_t1.csv"):
        names = ("hidden", "layers", "heads", "tp", "pp", "gpus", "batch")
        hidden, layers, heads, tensor, pipeline, devices, batch = (int(row[name]) for name in names)
        each = layers // pipeline
        stages = 1 if pipeline == 1 else next(n for n in range(2, each + 1) if each % n == 0)
        data = devices // (tensor * pipeline)
        work = Work(
            gpt(hidden, layers, heads, 51200, 2048),
            pipelined(pipeline, stages, tensor, data),
            sequence_length=2048,
            accumulation=batch // data,
            checkpointing="full",
            fused_attention=False,
            fused_loss=False,
            sequence_parallel=False,
        )
        where = cluster(f"{devices}xA100-80GB-SXM", "8x200Gb/s")
        name = f"{row['params_B']}B"
        yield Run("2104.04473 T1", name, name, where, work, float(row["iter_s_derived"]))


def recomputation_2022(folder: Path) -> Iterator[Run]:
    """arXiv 2205.05198, Table 5: all recomputed; attention recomputed and sequences parallel."""
    for row in rows(folder / "act_recompute.csv", 4):
        names = ("hidden", "layers", "heads", "tp", "pp", "interleave", "gpus", "gbs", "mbs")
        hidden, layers, heads, tensor, pipeline, stages, devices, batch, micro = (
            int(row[name]) for name in names
        )
        where = cluster(f"{devices}xA100-80GB-SXM", "8x200Gb/s")
        full = Work(
            gpt(hidden, layers, heads, 51200, 2048),
            pipelined(pipeline, stages, tensor),
            sequence_length=2048,
            micro_batch_size=micro,
            accumulation=batch // micro,
            checkpointing="full",
            fused_attention=False,
            fused_loss=False,
            sequence_parallel=False,
        )
        both = replace(full, checkpointing="selective", sequence_parallel=True)
        model = row["model"]
        yield Run("2205.05198 T5", model, f"{model} full", where, full, float(row["t_full_s"]))
        yield Run("2205.05198 T5", model, f"{model} selective", where, both, float(row["t_seqsel_s"]))


SHAPES = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}
DEVICES = {"a100_40gb": "A100-40GB-SXM", "a100_80gb": "A100-80GB-SXM", "h100_80gb": "H100-80GB-SXM"}


def llm_foundry(table: Path) -> Iterator[Run]:
    """MPT models under FSDP, fused attention; gradients in 16 bits where all is (PURE), else in 32."""
    for row in rows(table):
        sequence, devices = int(row["SeqLen (T)"]), int(row["# GPUs"])
        micro, accumulation = int(row["MicroBatchSize"]), int(row["GradAccum"])
        work = Work(
            gpt(*SHAPES[row["Model"]], 50368, sequence),
            Layout(shard=devices, stage=3 if row["Sharding Strategy"] == "FULL_SHARD" else 2),
            sequence_length=sequence,
            micro_batch_size=micro,
            accumulation=accumulation,
            precision="float8" if "fp8" in row["Precision"] else "bfloat16",
            checkpointing="full" if row["Activation Checkpointing"] == "True" else "none",
            reduce_bytes=2 if row["MP Mode"] == "PURE" else 4,
            fused_loss=False,
        )
        device = DEVICES[row["GPU"]]
        where = cluster(f"{devices}x{device}", "8x200Gb/s" if "A100" in device else "8x400Gb/s")
        seconds = micro * accumulation * sequence / float(row["Throughput (T/s/GPU)"])
        kind = f"llm-foundry {device[:4]}" + (" FP8" if work.precision == "float8" else "")
        yield Run(
            kind,
            row["Model"],
            f"{row['Model']} {sequence} x{devices} {micro}x{accumulation}",
            where,
            work,
            seconds,
        )


def published(folder: Path) -> list[Run]:
    """All of them."""
    return [
        *megatron_2021(folder),
        *recomputation_2022(folder),
        *llm_foundry(folder / "llm_foundry_fsdp.csv"),
    ]
