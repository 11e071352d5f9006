"""One point: what a run of this model in this layout takes on this cluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ropewalk.errors import UserError
from ropewalk.layout import DEGREES, ONE_STAGE, Layout, Schedule
from ropewalk.model.config import ModelConfig
from ropewalk.parallel import context_refusal, expert_refusal, pipeline_refusal, refusal
from ropewalk.plan.hardware import Cluster, cluster, precision_name
from ropewalk.plan.inputs import counted
from ropewalk.plan.memory import DeviceMemory, memory_of
from ropewalk.plan.sizes import config_from, step_flops
from ropewalk.plan.step_time import BlockTime, StepTime, step_time
from ropewalk.plan.traffic import traffic
from ropewalk.plan.work import Work, work_value

METHODS = ("full", "lora", "qlora", "dora", "prompt", "prefix", "bottleneck", "ia3", "bitfit")
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Estimate:
    """Seconds, tokens, memory and money of one optimizer step and of the run that it is part of."""

    work: Work
    cluster: Cluster
    time: StepTime
    memory: DeviceMemory
    """of the device that holds most"""

    @property
    def layout(self) -> Layout:
        return self.work.layout

    @property
    def step_seconds(self) -> float:
        return self.time.seconds

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.work.step_tokens / self.time.seconds

    @property
    def fits(self) -> bool:
        """Whether the worst device holds it, with the upper end of what fragments and the runtime take."""
        return self.memory.high <= self.memory.limit and self.memory.host_fits

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak, all (query, key) pairs counted (arXiv 2205.05198)."""
        return self._share(step_flops(self.work, causal=False))

    @property
    def mfu_causal(self) -> float:
        """The same with the pairs that are attended."""
        return self._share(step_flops(self.work))

    @property
    def hfu(self) -> float:
        """With what is recomputed, all pairs counted."""
        return self._share(step_flops(self.work, causal=False, recomputed=True))

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that a device sends in a step, by kind; see `traffic`."""
        return traffic(self.work)

    @property
    def dollars_per_hour(self) -> float | None:
        price = self.cluster.price if self.cluster.price is not None else self.cluster.accelerator.price
        return None if price is None else price * self.cluster.devices

    def _share(self, flops: float) -> float:
        peak = self.cluster.accelerator.peak_of(self.work.precision) * self.cluster.devices
        return flops / self.time.seconds / peak


def point(work: Work, where: Cluster, blocks: BlockTime | None = None) -> Estimate:
    """The estimate of a Work that is already laid out. `blocks`: see `step_time`."""
    return Estimate(work, where, step_time(work, where, blocks), memory_of(work, where))


def estimate(
    model: ModelConfig | Mapping[str, Any],
    layout: Layout | Mapping[str, Any] | None = None,
    on: str | Cluster = "1xH100",
    *,
    seq_len: int = 2048,
    micro_batch: int = 1,
    global_batch: int | None = None,
    precision: str = "bf16",
    recompute: Recompute = "none",
    adapt: str = "full",
    rank: int = 16,
    network: str | None = None,
    attention: Literal["fused", "written"] = "fused",
    **more: Any,
) -> Estimate:
    """What one step takes: seconds, memory, whether it fits.

    model: a ModelConfig or Hugging Face fields. layout: a Layout, or its degrees (`replicate, shard, stage,
    tensor, context, pipeline, virtual, expert`); what is left of the devices shards. on:
    `1024xA100-80GB-SXM`, or a cluster file; network: the connections of a node, `8x200Gb/s`. global_batch:
    rows of a step; one micro-batch each unless told. attention: `written` where scores are kept in memory,
    as before FlashAttention. more: further fields of Work. UserError for whatever cannot be.
    """
    where = cluster(on, network)
    config = config_from(model)
    seq_len, micro_batch = counted(seq_len, "seq_len"), counted(micro_batch, "micro_batch")
    if attention not in ("fused", "written"):
        raise UserError(f"attention {attention}: one of fused, written")
    kind = precision_name(precision)
    if kind == "float16" and "bfloat16" in where.accelerator.peak:
        kind = "bfloat16"  # as fast and as large
    if kind not in ("bfloat16", "float8", "float32"):
        raise UserError(f"precision {precision}: training is in bf16, fp8 or fp32 here")
    where.accelerator.peak_of(kind)
    laid = laid_out(layout, config, where.devices)
    if seq_len < laid.whole:
        raise UserError(
            f"seq_len {seq_len}: tensor {laid.tensor} and context {laid.context} divide rows of {laid.whole} "
            "tokens or more"
        )
    per_pass = micro_batch * laid.data
    rows = per_pass * laid.pipeline if global_batch is None else counted(global_batch, "global_batch")
    if rows % per_pass:
        raise UserError(
            f"global_batch {rows}: no multiple of {micro_batch} (micro_batch) x {laid.data} groups; "
            f"{max(1, round(rows / per_pass)) * per_pass} is"
        )
    if adapt not in METHODS:
        raise UserError(f"adapt {adapt}: one of {', '.join(METHODS)}")
    values = {
        "sequence_length": seq_len,
        "micro_batch_size": micro_batch,
        "accumulation": rows // per_pass,
        "precision": kind,
        "method": "lora" if adapt == "qlora" else adapt,
        "quantize": "nf4" if adapt == "qlora" else "none",
        "rank": counted(rank, "rank"),
        "checkpointing": work_value("checkpointing", recompute, "recompute"),
        "fused_attention": attention == "fused",
        "device": "cpu" if where.accelerator.name.startswith("CPU") else "cuda",
        **{name: work_value(name, value) for name, value in more.items()},
    }
    if values["quantize"] != "none" and values["method"] == "full":
        raise UserError(f"quantize {values['quantize']}: such weights cannot be trained; take adapt lora")
    return point(replace(Work(config, laid), **values), where)


def laid_out(layout: Layout | Mapping[str, Any] | None, config: ModelConfig, devices: int) -> Layout:
    """The layout over so many devices, its shards filled up. UserError where the degrees cannot be."""
    if not isinstance(layout, Layout | Mapping | None):
        raise UserError(f"layout: a Layout, or its degrees, as in {{'tensor': 8}}; not {layout!r}")
    said = vars(layout) if isinstance(layout, Layout) else dict(layout or {})
    for name in (*DEGREES, "expert"):
        if said.get(name, -1) != -1:
            said = {**said, name: counted(said[name], f"layout.{name} (-1: the rest)")}
    whole = (Layout(**said) if isinstance(layout, Layout) else _from_degrees(said)).over(devices)
    refuse(whole, config)
    return whole


def _from_degrees(said: dict[str, Any]) -> Layout:
    """A Layout of degrees that are whole numbers. What is left of the devices shards, unless told."""
    choices = {"pipeline_schedule": get_args(Schedule), "context_exchange": ("all_gather", "ring", "ulysses")}
    known = {*DEGREES, "expert", "stage", "virtual", *choices}
    for name in said:
        if name not in known:
            raise UserError(f"layout: unknown degree {name}; there are {', '.join(sorted(known))}")
    for name, there in choices.items():
        if name in said and said[name] not in there:
            raise UserError(f"layout.{name}: one of {', '.join(there)}, not {said[name]!r}")
    stage = said.get("stage", 3)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"layout.stage: 1, 2 or 3 (ZeRO), not {stage!r}")
    stages = said.pop("virtual", None)
    if stages is not None and counted(stages, "layout.virtual") > 1:
        said.setdefault("pipeline_schedule", "interleaved-1f1b")
    if stage == 0:  # nothing is divided: copies, as many as there is room for unless told
        copies = said.get("replicate", 1), said.get("shard", 1 if "replicate" in said else -1)
        said |= {"replicate": -1 if -1 in copies else math.prod(copies), "shard": 1, "stage": 1}
    elif "shard" not in said:
        said["shard"] = 1 if any(said.get(name) == -1 for name in DEGREES) else -1
    return Layout(**said, pipeline_stages=stages if said.get("pipeline", 1) != 1 else None)


def refuse(layout: Layout, config: ModelConfig) -> None:
    """UserError where a model cannot be divided so, naming what is in the way and the nearest degree that
    works."""
    schedule = layout.pipeline_schedule
    if schedule in ONE_STAGE and layout.stages_each > 1:
        raise UserError(f"layout: with {schedule} a process has one run of blocks; take interleaved-1f1b")
    reasons = {
        # a vocabulary is padded where it must be, as Megatron-LM's: whatever the degree, it divides nothing
        "tensor": refusal(replace(config, vocab_size=0), layout.tensor),
        "context": context_refusal(config, layout),
        "pipeline": pipeline_refusal(config, layout),
        "expert": expert_refusal(config, layout),
    }
    for name, why in reasons.items():
        if why is not None:
            raise UserError(f"layout.{name}: {why.replace('parallel.', 'layout.')}")
