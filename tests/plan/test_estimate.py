"""Single points, the search, and what makes a run fit: equal to published findings, and sane everywhere."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.plan import Cluster, Estimate, Work, cluster, estimate, search
from ropewalk.plan.estimates import point
from ropewalk.plan.hardware import accelerator, accelerators
from ropewalk.plan.kernels import Kernels
from ropewalk.plan.memory import memory_of
from ropewalk.plan.search import fixes
from ropewalk.plan.sizes import config_from, parameters, step_flops
from ropewalk.plan.step_time import head_time, step_time

from .published_runs import gpt, pipelined, rows

GiB = 2**30
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
LLAMA_405B = {
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "vocab_size": 128256,
}
BLOOM = {"hidden_size": 14336, "num_hidden_layers": 70, "num_attention_heads": 112, "vocab_size": 250880}
GPT_530B = {"hidden_size": 20480, "num_hidden_layers": 105, "num_attention_heads": 128, "vocab_size": 51200}


def test_parameters_are_counted() -> None:
    """Those that the models' cards give."""
    assert parameters(config_from(LLAMA_8B)) == 8_030_261_248
    assert parameters(config_from(LLAMA_405B)) == pytest.approx(405.85e9, rel=1e-4)
    assert parameters(config_from(BLOOM)) == pytest.approx(176.2e9, rel=0.01)


def test_flops_are_the_papers() -> None:
    """Model and hardware FLOPs of a GPT step by 2205.05198's equations; causal pairs are half of all."""
    from .published_formulas import megatron_flops

    work = Work(gpt(12288, 96, 96, 51200, 2048), Layout(shard=1), sequence_length=2048, accumulation=64)
    sizes = 64, 2048, 96, 12288, 51200
    assert step_flops(work, causal=False) == pytest.approx(megatron_flops(*sizes), rel=1e-6)
    full = dataclasses.replace(work, checkpointing="full")
    assert step_flops(full, causal=False, recomputed=True) == pytest.approx(
        megatron_flops(*sizes, "full"), rel=1e-6
    )
    span = step_flops(work, causal=False) - step_flops(work)
    assert span == pytest.approx(64 * 96 * 3 * 4 * 12288 * 2048 * 2047 / 2, rel=1e-9)


def test_zero_3_of_530b_on_560_devices_does_not_fit(shared: Path) -> None:
    """arXiv 2104.04473, section 5.2: with a micro-batch of 4 it took 640."""
    one = estimate(
        GPT_530B,
        {"shard": 560, "stage": 3},
        "560xA100-80GB-SXM",
        micro_batch=4,
        global_batch=2240,
        recompute="full",
    )
    assert not one.fits
    assert one.memory.low > one.memory.limit


def test_bloom_takes_three_terabytes_and_about_72_devices() -> None:
    """Model states alone: 16 bytes a parameter, 2.8 TB. What a step needs beside them 72 devices of 80 GB
    have room for, with products divided in each node; 32 have it only with states in the hosts' memory."""
    sharded = estimate(BLOOM, {"shard": 64}, "64xA100-80GB-SXM", recompute="full")
    states = ("weights trained", "gradients", "optimizer states", "masters")
    assert 2.7e12 < 64 * sum(sharded.memory.terms[name] for name in states) < 3.3e12

    def found(count: int) -> list[Estimate]:
        return searched(BLOOM, f"{count}xA100-80GB-SXM", sequence_length=2048, accumulation=8)[0]

    assert not found(72)[0].work.offload
    assert all(one.work.offload for one in found(32))


def test_schemes_in_the_order_of_the_papers_table(shared: Path) -> None:
    """Table 2 of 2104.04473: the days in their order, within a scheme and between them; pipeline and tensor
    parallelism to 6%. ZeRO-3's collectives of 2021 moved what one of a node's eight connections carries."""
    days: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows(shared / "reference" / "sc21_t2.csv"):
        hidden, layers, heads = (12288, 96, 96) if row["params_B"] == "174.6" else (20480, 105, 128)
        devices, batch, degree = int(row["gpus"]), int(row["batch"]), int(row["mp"])
        layout = Layout(shard=devices)
        if row["scheme"] == "PTD":
            layout = pipelined(degree // 8, 2 if degree == 96 else 3, 8, devices // degree)
        micro = int(row["microbatch"])
        work = Work(
            gpt(hidden, layers, heads, 51200, 2048),
            layout,
            sequence_length=2048,
            micro_batch_size=micro,
            accumulation=batch // (micro * layout.data),
            checkpointing="full",
            fused_attention=False,
            sequence_parallel=False,
        )
        schemes = {row["scheme"]: "8x200Gb/s"}
        if row["scheme"] == "ZeRO-3":
            schemes["ZeRO-3, one connection"] = "1x200Gb/s"
        for scheme, network in schemes.items():
            seconds = point(work, cluster(f"{devices}xA100-80GB-SXM", network)).step_seconds
            ours = 300e9 / (batch * 2048) * seconds / 86400
            days.setdefault((scheme, row["params_B"]), []).append((float(row["days_300B"]), ours))
    for (scheme, _), found in days.items():
        ours = [mine for _, mine in found]
        assert sorted(range(3), key=ours.__getitem__) == sorted(range(3), key=lambda i: -i)
        if scheme == "PTD":
            assert all(abs(mine / theirs - 1) < 0.06 for theirs, mine in found)
    assert days["PTD", "174.6"][-1][1] < days["ZeRO-3", "174.6"][-1][1]
    for size in ("174.6", "529.6"):
        pairs = zip(days["PTD", size], days["ZeRO-3, one connection", size], strict=True)
        assert all(parted < sharded for (_, parted), (_, sharded) in pairs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"on": "8xH101"}, "did you mean H100"),
        ({"on": "0xH100"}, "above 0"),
        (
            {"layout": {"tensor": 3, "shard": 1}, "on": "3xH100"},
            "layout.tensor: 3 does not divide num_attention_heads 32",
        ),
        (
            {"layout": {"pipeline": 64}, "on": "64xH100"},
            "64 blocks, and the model has 32; set layout.pipeline: 32",
        ),
        ({"layout": {"shard": 3}, "on": "8xH100"}, "does not make 8"),
        ({"layout": {"shards": 8}, "on": "8xH100"}, "unknown degree shards"),
        ({"layout": {"shard": 0}}, "layout.shard"),
        ({"layout": {"expert": 2}, "on": "8xH100"}, "has no experts"),
        ({"seq_len": 0}, "seq_len"),
        ({"micro_batch": -1}, "micro_batch"),
        ({"global_batch": 12, "on": "8xH100"}, "global_batch 12"),
        ({"precision": "bf8"}, "precision bf8"),
        ({"precision": "fp8", "on": "1xA100"}, "does not multiply float8"),
        ({"recompute": "some"}, "recompute some"),
        ({"adapt": "lore"}, "adapt lore"),
        ({"network": "fast"}, "8x200Gb/s"),
        ({"model": {"hidden_size": 64}}, "lacks num_hidden_layers"),
        ({"model": LLAMA_8B | {"num_hidden_layers": -2}}, "num_hidden_layers"),
        ({"model": LLAMA_8B | {"num_key_value_heads": 5}}, "no multiple of num_key_value_heads"),
        ({"model": LLAMA_8B | {"num_experts": "eight"}}, "num_experts"),
        ({"model": LLAMA_8B | {"num_experts": -8, "num_experts_per_tok": 2}}, "num_experts"),
        ({"model": LLAMA_8B | {"num_experts": 8}}, "num_experts_per_tok"),
        ({"model": LLAMA_8B | {"num_experts": 4, "num_experts_per_tok": 8}}, "num_experts_per_tok 8"),
        ({"model": LLAMA_8B | {"n_routed_experts": 64}}, "n_routed_experts"),
        ({"model": {"model_type": "llama", "hidden_size": 64}}, "vocab_size"),
        ({"on": 8}, "8xH100"),
        ({"on": ""}, "8xH100"),
        ({"on": None}, "8xH100"),
        ({"on": "16xH100", "network": "0x400Gb/s"}, "8x200Gb/s"),
        ({"on": "16xH100", "network": 400}, "8x200Gb/s"),
        ({"layout": "tensor 8"}, "layout"),
        ({"layout": {"pipeline": 4, "pipeline_schedule": "magic"}, "on": "4xH100"}, "magic"),
        ({"layout": {"context": 2, "context_exchange": "magic"}, "on": "2xH100"}, "magic"),
        ({"layout": {"pipeline": 4, "virtual": -1}, "on": "4xH100"}, "layout.virtual"),
        (
            {"layout": {"pipeline": 4, "virtual": 2, "pipeline_schedule": "1f1b"}, "on": "4xH100"},
            "one run of blocks",
        ),
        ({"layout": {"stage": True}}, "layout.stage"),
        ({"layout": Layout(tensor=0)}, "layout.tensor"),
        ({"layout": Layout(tensor=-2)}, "layout.tensor"),
        ({"layout": {"context": 4}, "on": "4xH100", "seq_len": 3}, "seq_len 3"),
        ({"optimizer": "sgd"}, "optimizer sgd"),
        ({"state_bits": 16}, "state_bits 16"),
        ({"scored": 0}, "scored 0"),
        ({"scored": 2}, "scored 2"),
        ({"document_length": -5}, "document_length -5"),
        ({"checkpointing_every": 0}, "checkpointing_every 0"),
        ({"checkpointing_budget": 1.5}, "checkpointing_budget 1.5"),
        ({"loss_chunk": 0}, "loss_chunk 0"),
        ({"accumulation": 0}, "accumulation 0"),
        ({"quantize": "int3", "adapt": "lora"}, "quantize int3"),
        ({"quantize": "nf4"}, "quantize nf4"),
        ({"device": "tpu"}, "device tpu"),
        ({"adapt": "lora", "targets": "q_proj"}, "targets q_proj"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_cannot_be_costs_one_message(change: dict[str, Any], words: str) -> None:
    options = {"model": LLAMA_8B, "on": "1xH100", **change}
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        estimate(options.pop("model"), options.pop("layout", None), options.pop("on"), **options)
    assert words in str(caught.value)


def test_what_is_said_in_other_words_is_the_same() -> None:
    """Whole numbers of any type; what is left of the devices copies, shards or divides, wherever it is said;
    a schedule has the stages that it needs; a family's own names of fields."""
    whole = {name: np.int64(size) for name, size in LLAMA_8B.items()}
    assert estimate(whole, seq_len=np.int64(2048)).work == estimate(LLAMA_8B, seq_len=2048).work  # type: ignore[arg-type]
    for said, shard, replicate in (
        ({"replicate": 4}, 2, 4),
        ({"replicate": np.int64(8)}, 1, 8),
        ({"replicate": -1}, 1, 8),
        ({"stage": 0}, 1, 8),
        ({"stage": 0, "tensor": 2}, 1, 4),
        ({"stage": 0, "shard": -1}, 1, 8),
        ({"pipeline": -1}, 1, 1),
    ):
        found = estimate(LLAMA_8B, said, "8xH100").layout
        assert (found.shard, found.replicate) == (shard, replicate), said
    zbv = estimate(LLAMA_8B, {"pipeline": 4, "pipeline_schedule": "zbv"}, "4xH100", global_batch=8)
    assert zbv.layout.stages_each == 2
    names = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    assert parameters(config_from({"model_type": "gpt2", **names})) == 124_439_808


def test_hardware_flops_count_what_a_budget_recomputes() -> None:
    kept = estimate(LLAMA_8B, checkpointing_budget=0.5)
    assert kept.hfu == pytest.approx(kept.mfu * (1 + 0.5 / 3), rel=0.02)


def test_a_card_is_known_as_its_driver_calls_it() -> None:
    for name, known in (
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 NVL", "H100-94GB-NVL"),
        ("Tesla T4", "T4-16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
    ):
        assert accelerator(name).name == known


def test_every_accelerator_is_whole() -> None:
    """Each can be asked for by its name, says where its figures are from, and gives an estimate."""
    small = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1024}
    assert len(accelerators()) >= 20
    for name in accelerators():
        device = accelerator(name.lower())
        assert len(device.source) > 10
        assert 0 < device.matmul <= 1
        kind = "bf16" if "bfloat16" in device.peak else "fp32"
        one = estimate(small, None, f"1x{name}", precision=kind, seq_len=512)
        assert one.fits
        assert 0 < one.mfu < 1, name


def test_a_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "accelerator: {name: H100, memory: 94GiB}\nnodes: 4\nper_node: 4\nnetwork: 4x400Gb/s\nprice: 2.5\n"
        "oversubscription: 2\n"
    )
    found = cluster(file)
    assert (found.devices, found.nodes, found.accelerator.memory) == (16, 4, 94 * GiB)
    assert found.network == 25e9  # 400 Gb/s of each device, halved
    assert estimate(LLAMA_8B, None, found, recompute="full").dollars_per_hour == 40
    for text, words in (
        ("nodes: 2\n", "accelerator"),
        ("accelerator: H100\nnode: 2\n", "did you mean nodes"),
        ("accelerator: H100\nnodes: two\n", "nodes"),
        ("accelerator: {name: H100, memry: 1}\n", "did you mean memory"),
        ("a: [", "not YAML"),
        ("accelerator: null\n", "at least accelerator"),
        ("accelerator: {memory: 80GiB}\n", "at least accelerator"),
        ("accelerator: {name: H100, peak: 3}\n", "peak"),
        ("accelerator: {name: H100, own: 3}\n", "own"),
        ("accelerator: {name: H100, torus: 3}\n", "torus"),
        ("accelerator: {name: H100, 3: 4}\n", "unknown field 3"),
        ("accelerator: {name: H100, memory: null}\n", "memory"),
        ("accelerator: {name: H100, per_node: 2.5}\n", "per_node"),
        ("accelerator: {name: H100, matmul: 3}\n", "share"),
        ("accelerator: H100\ntorus: 4\n", "torus"),
        ("accelerator: TPU-v4\ntorus: [2.5]\n", "torus"),
        ("accelerator: H100\ntopology: torus\n", "length of each side"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            cluster(file)


def test_more_of_anything_takes_more() -> None:
    """Longer rows, more rows and more layers never take less; savers never take more memory nor less time."""
    base = Work(config_from(LLAMA_8B), Layout(shard=8), sequence_length=2048, micro_batch_size=2)
    where = cluster("8xH100")
    one = point(base, where)
    for change in ({"sequence_length": 4096}, {"micro_batch_size": 4}):
        more = point(dataclasses.replace(base, **change), where)  # type: ignore[arg-type]
        assert more.memory.total_bytes > one.memory.total_bytes
        assert more.step_seconds > one.step_seconds
    saved = [point(dataclasses.replace(base, checkpointing=mode), where) for mode in ("selective", "full")]  # type: ignore[arg-type]
    assert one.memory.total_bytes > saved[0].memory.total_bytes > saved[1].memory.total_bytes
    assert one.step_seconds < saved[0].step_seconds < saved[1].step_seconds
    adapted = point(dataclasses.replace(base, method="lora"), where)
    assert adapted.memory.total_bytes < one.memory.total_bytes
    assert adapted.step_seconds < one.step_seconds


def test_what_is_frozen_or_has_no_adapter_takes_no_time() -> None:
    """All but the last of 32 blocks frozen: a 32nd of the blocks' gradients, and none below. Adapters by
    name: on all linear layers as `all-linear`, on two of them less."""
    model = config_from(LLAMA_8B)
    where = Cluster(accelerator("h100"), 1, 1)

    def phases(**fields: Any) -> dict[str, float]:
        return step_time(Work(model, sequence_length=4096, **fields), where).phases

    last = ("embed.*", "head.*", *(f"blocks.{layer}.*" for layer in range(31)))
    everything, little = phases(), phases(freeze=last)
    head = head_time(Work(model, sequence_length=4096, freeze=last), Kernels(where.accelerator, "bfloat16"))
    whole = head_time(Work(model, sequence_length=4096), Kernels(where.accelerator, "bfloat16"))
    blocks = everything["backward"] - whole.backward
    assert little["forward"] == everything["forward"]
    assert little["backward"] - head.backward == pytest.approx(blocks / 32, rel=1e-3)
    assert little["optimizer"] < everything["optimizer"] / 30
    names = tuple(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    linear, named, two = (
        phases(method="lora", **some) for some in ({}, {"targets": names}, {"targets": ("q_proj", "v_proj")})
    )
    assert named["forward"] == pytest.approx(linear["forward"], rel=1e-6)
    assert everything["forward"] < two["forward"] < linear["forward"]
    assert two["optimizer"] < linear["optimizer"] / 3


def test_a_pipeline_holds_what_is_under_way() -> None:
    """The first of eight stages holds eight micro-batches of an eighth of the layers, however many come."""
    base = Work(config_from(LLAMA_8B), Layout(shard=1, pipeline=8), sequence_length=4096, accumulation=64)
    where = cluster("8xH100")
    held = memory_of(base, where).terms
    assert held["activations of further micro-batches"] == pytest.approx(7 * held["activations"])
    few = memory_of(dataclasses.replace(base, accumulation=8), where)
    assert few.terms == held
    all_first = dataclasses.replace(base, layout=dataclasses.replace(base.layout, pipeline_schedule="gpipe"))
    assert memory_of(all_first, where).total_bytes > 4 * memory_of(base, where).total_bytes


def test_fixes_fit_when_they_say_so() -> None:
    """Full fine-tuning of 8B on one device of 80 GB: what would help, the sufficient first, and it does."""
    work = Work(config_from(LLAMA_8B), Layout(shard=1), sequence_length=4096, micro_batch_size=2)
    where = cluster("1xH100")
    assert not point(work, where).fits
    found = fixes(work, where)
    assert found
    assert found[0].fits
    assert [fix.fits for fix in found] == sorted((fix.fits for fix in found), reverse=True)
    assert any("adapt.method=lora" in fix.change and fix.fits for fix in found)
    assert all(fix.saved > 0 for fix in found)


def searched(model: dict[str, int], on: str, **options: Any) -> tuple[list[Estimate], Work, Cluster]:
    where = cluster(on)
    work = Work(config_from(model), Layout(shard=where.devices), **options)
    return search(work, where), work, where


def test_the_search_finds_what_fits_and_is_fastest() -> None:
    """Nothing found is too large; none of the plain layouts that fit is faster than the first."""
    found, work, where = searched(LLAMA_8B, "16xH100", sequence_length=4096, accumulation=4)
    assert found
    assert all(one.fits and one.work.batch_size == work.batch_size for one in found)
    assert [one.step_seconds for one in found] == sorted(one.step_seconds for one in found)
    for saver in ("none", "selective", "full"):
        plain = point(dataclasses.replace(work, checkpointing=saver), where)  # type: ignore[arg-type]
        if plain.fits:
            assert plain.step_seconds >= 0.999 * found[0].step_seconds


def test_nothing_fits_where_nothing_can() -> None:
    assert searched(LLAMA_405B, "8xL4", sequence_length=4096)[0] == []


def test_16384_devices_are_searched_in_seconds() -> None:
    """Llama 3's 405B: the best layouts divide products inside a node and blocks over nodes, as was done."""
    began = time.process_time()
    where = cluster("16384xH100", "8x400Gb/s")
    work = Work(config_from(LLAMA_405B), Layout(shard=2048, tensor=8), sequence_length=8192, accumulation=1)
    found = search(work, where)
    assert time.process_time() - began < 6  # 3 s on a quiet machine of 2 cores; others may be at work
    assert found[0].layout.tensor > 1
    assert 0.3 < found[0].mfu < 0.6
