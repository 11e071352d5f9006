"""One point: what a run of this model in this layout takes on this cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ropewalk.errors import UserError
from ropewalk.layout import DEGREES, Layout
from ropewalk.model.config import ModelConfig
from ropewalk.parallel import context_refusal, expert_refusal, pipeline_refusal, refusal
from ropewalk.plan.hardware import Cluster, cluster, precision_name
from ropewalk.plan.inputs import counted
from ropewalk.plan.memory import DeviceMemory, memory_of
from ropewalk.plan.sizes import config_from, step_flops
from ropewalk.plan.step_time import BlockTime, StepTime, step_time
from ropewalk.plan.work import Work

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
    for name, value in (("seq_len", seq_len), ("micro_batch", micro_batch), ("rank", rank)):
        counted(value, name)
    if recompute not in ("none", "selective", "full"):
        raise UserError(f"recompute {recompute}: one of none, selective, full")
    if attention not in ("fused", "written"):
        raise UserError(f"attention {attention}: one of fused, written")
    kind = precision_name(precision)
    if kind == "float16" and "bfloat16" in where.accelerator.peak:
        kind = "bfloat16"  # as fast and as large
    if kind not in ("bfloat16", "float8", "float32"):
        raise UserError(f"precision {precision}: training is in bf16, fp8 or fp32 here")
    where.accelerator.peak_of(kind)
    laid = laid_out(layout, config, where.devices)
    per_pass = micro_batch * laid.data
    rows = per_pass * (laid.pipeline if laid.pipeline > 1 else 1) if global_batch is None else global_batch
    counted(rows, "global_batch")
    if rows % per_pass:
        raise UserError(
            f"global_batch {rows}: no multiple of {micro_batch} (micro_batch) x {laid.data} groups; "
            f"{max(1, round(rows / per_pass)) * per_pass} is"
        )
    known = {one.name for one in fields(Work)}
    for name in more:
        if name not in known:
            raise UserError(f"estimate: unknown option {name}")
    quantize: Literal["none", "nf4"] = "nf4" if adapt == "qlora" else "none"
    method = "lora" if adapt == "qlora" else adapt
    if method not in ("full", "lora", "dora", "prompt", "prefix", "bottleneck", "ia3", "bitfit"):
        raise UserError(
            f"adapt {adapt}: one of full, lora, qlora, dora, prompt, prefix, bottleneck, ia3, bitfit"
        )
    work = Work(
        config,
        laid,
        sequence_length=seq_len,
        micro_batch_size=micro_batch,
        accumulation=rows // per_pass,
        precision="float32" if kind == "float32" else "float8" if kind == "float8" else "bfloat16",
        method=method,  # type: ignore[arg-type]  # checked above
        quantize=quantize,
        rank=rank,
        checkpointing=recompute,
        fused_attention=attention == "fused",
        device="cpu" if where.accelerator.name.startswith("CPU") else "cuda",
    )
    return point(replace(work, **more), where)


def laid_out(layout: Layout | Mapping[str, Any] | None, config: ModelConfig, devices: int) -> Layout:
    """The layout over so many devices, its shards filled up. UserError where the degrees cannot be."""
    if not isinstance(layout, Layout):
        layout = _from_degrees(dict(layout or {}))
    whole = layout.over(devices)
    refuse(whole, config)
    return whole


def _from_degrees(said: dict[str, Any]) -> Layout:
    known = {*DEGREES, "expert", "stage", "virtual", "pipeline_schedule", "context_exchange"}
    for name, value in said.items():
        if name not in known:
            raise UserError(f"layout: unknown degree {name}; there are {', '.join(sorted(known))}")
        if name in (*DEGREES, "expert", "virtual") and (
            isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1
        ):
            raise UserError(f"layout.{name}: must be a whole number above 0 (or -1: the rest), not {value!r}")
    if said.get("stage", 3) not in (0, 1, 2, 3):
        raise UserError(f"layout.stage: 1, 2 or 3 (ZeRO), not {said['stage']!r}")
    stages = said.pop("virtual", 1)
    if said.get("stage") == 0:  # nothing is divided: copies
        said["replicate"], said["shard"] = said.get("replicate", 1) * said.get("shard", 1), 1
        said["stage"] = 1
    if "shard" not in said and -1 not in said.values():
        said["shard"] = -1 if "replicate" not in said else 1
    if stages > 1 and "pipeline_schedule" not in said:
        said["pipeline_schedule"] = "interleaved-1f1b"
    return Layout(**said, pipeline_stages=stages if said.get("pipeline", 1) != 1 else None)


def refuse(layout: Layout, config: ModelConfig) -> None:
    """UserError where a model cannot be divided so, naming what is in the way and the nearest degree that
    works."""
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
