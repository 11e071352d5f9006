"""Steps that were published elsewhere than in the tables that the planner's constants were fitted on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ropewalk.plan import estimate
from ropewalk.plan.step_time import step_time

from .published_runs import llm_foundry

GPT_175B = {"hidden_size": 12288, "num_hidden_layers": 96, "vocab_size": 50000}


def errors_of_llm_foundry(*models: str) -> list[float]:
    runs = llm_foundry(Path(__file__).with_name("llm_foundry_more.csv"))
    return [step_time(run.work, run.cluster).seconds / run.seconds - 1 for run in runs if run.model in models]


def test_131_more_rows_of_llm_foundry_are_foreseen_within_4_percent_on_average() -> None:
    """The rest of the README of which a part is what the constants were fitted on; three of its shapes, 125M
    to 760M, are not in that part at all."""
    known, new = errors_of_llm_foundry(*"1b 3b 7b 13b 30b 70b".split()), errors_of_llm_foundry("760m", "350m")
    small = errors_of_llm_foundry("125m")
    assert (len(known), len(new), len(small)) == (62, 50, 19)
    assert np.mean(np.abs(known + new + small)) < 0.04
    assert np.mean(np.abs(known)) < 0.05
    assert np.mean(np.abs(new)) < 0.035
    assert np.mean(np.abs(small)) < 0.035


SHAPES = {  # hidden, layers, heads, inner
    "8B": (4096, 32, 32, 14336),
    "70B": (8192, 80, 64, 28672),
    "405B": (16384, 126, 128, 53248),
}
PIPELINE = {"shard": 8, "tensor": 8, "pipeline": 8, "stage": 2}
TORCHTITAN: list[tuple[str, dict[str, Any], str, dict[str, Any], int]] = [
    ("8B", {"shard": 8}, "8xH100", {"micro_batch": 2, "precision": "bf16"}, 6667),
    ("8B", {"shard": 8}, "8xH100", {"micro_batch": 2}, 8532),
    ("8B", {"shard": 128}, "128xH100", {"micro_batch": 2, "precision": "bf16"}, 6514),
    ("8B", {"shard": 128}, "128xH100", {"micro_batch": 2}, 8380),
    ("8B", {"shard": 8}, "8xH100", {"seq_len": 32768, "recompute": "full"}, 3890),
    ("8B", {"shard": 4, "context": 2}, "8xH100", {"seq_len": 65536, "recompute": "full"}, 2540),
    ("8B", {"shard": 2, "context": 4}, "8xH100", {"seq_len": 131072, "recompute": "full"}, 1071),
    ("8B", {"context": 8}, "8xH100", {"seq_len": 262144, "recompute": "full"}, 548),
    ("70B", {"shard": 32, "tensor": 8}, "256xH100", {"micro_batch": 16, "recompute": "full"}, 829),
    ("405B", PIPELINE, "512xH100", {"global_batch": 256, "recompute": "full"}, 100),
    (
        "405B",
        PIPELINE | {"virtual": 2, "pipeline_schedule": "interleaved-1f1b"},
        "512xH100",
        {"global_batch": 256, "recompute": "full"},
        128,
    ),
    ("8B", {"shard": 32}, "32xH200", {"micro_batch": 2}, 10938),
    ("8B", {"shard": 64}, "64xH200", {"micro_batch": 2}, 10753),
]
"""Tokens/s a device of torchtitan's compiled runs (its benchmarks/ of 2024-12 and, H200, of 2025-06); in
float8 unless said. Its pipelines keep gathered weights, as stage 2."""


def test_torchtitans_llamas_on_8_to_512_gpus_are_foreseen_within_10_percent_on_average() -> None:
    errors = []
    for model, layout, on, options, published in TORCHTITAN:
        hidden, layers, heads, inner = SHAPES[model]
        fields = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "intermediate_size": inner,
            "vocab_size": 128256,
        }
        usual = {"seq_len": 8192, "recompute": "selective", "precision": "fp8", "compile": True}
        one = estimate(fields, layout, on, network="8x400Gb/s", **usual | options)
        assert one.fits
        errors.append(one.step_seconds * published * one.cluster.devices / one.work.step_tokens - 1)
    assert np.mean(np.abs(errors)) < 0.10
    assert np.max(np.abs(errors)) < 0.30


MEGATRON = {256: 40.0, 512: 21.2, 768: 15.2, 1024: 11.9, 3072: 29.02, 6144: 14.78, 8192: 12.24, 12288: 8.57}
"""Seconds a step of Megatron-LM's 175B by devices: arXiv 2402.15627, Table 2; 768 rows, then 6,144."""


def test_megatron_at_up_to_12288_devices_is_foreseen_within_8_percent_on_average() -> None:
    """None comes out too slow: what grows with the rows is foreseen 4% too slow, and of the 2.5 s that a step
    takes besides 1.0."""
    model = {**GPT_175B, "num_attention_heads": 128, "vocab_size": 64000}
    errors = []
    for devices, seconds in MEGATRON.items():
        one = estimate(
            model,
            {"tensor": 8, "pipeline": 8, "virtual": 6, "shard": devices // 64, "stage": 1},
            f"{devices}xA100-80GB-SXM",
            global_batch=768 if devices < 3072 else 6144,
            recompute="selective",
            network="8x200Gb/s",
            fused_loss=False,
        )
        assert one.fits
        errors.append(one.step_seconds / seconds - 1)
    assert np.mean(np.abs(errors)) < 0.08
    assert np.max(np.abs(errors)) < 0.13


@pytest.mark.parametrize(("micro", "published"), [(1, 173), (2, 186)])
def test_175b_sharded_over_128_to_512_devices_as_the_paper_of_fsdp_has_it(micro: int, published: int) -> None:
    """TFLOP/s a device, recomputation counted, in arXiv 2304.11277, section 5.4 (A100-80GB, hosts of 2 Tb/s).
    As fast on 512 devices as on 128; ZeRO-3 of 2021 was not."""
    for devices in (128, 512):
        one = estimate(
            {**GPT_175B, "num_attention_heads": 96},
            {"shard": devices, "stage": 3},
            f"{devices}xA100-80GB-SXM",
            micro_batch=micro,
            global_batch=micro * devices,
            recompute="full",
            network="8x250Gb/s",
            fused_loss=False,
        )
        assert one.fits
        assert one.hfu * 312 == pytest.approx(published, rel=0.07)
