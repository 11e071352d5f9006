"""Memory of the device that holds most, in any layout: what `step_memory` counts, what a pipeline adds, and
a band.

The counting knows one stage; a pipeline's first process holds one stage's weights and the activations of
all the micro-batches that are under way (`pipeline_schedule.chunks_held`). What the runtime takes, and what
is lost between tensors, nobody can count beforehand: it is a band, `low` to `high`.
"""

from dataclasses import dataclass, replace

from ropewalk.model.config import ModelConfig
from ropewalk.plan.hardware import Cluster
from ropewalk.plan.pipeline_schedule import chunks_held
from ropewalk.plan.step_memory import step_memory
from ropewalk.plan.step_time import SCHEDULES
from ropewalk.plan.work import Work
from ropewalk.train.flops import stages_of

FRAGMENTS = 0.06
"""Upper end of what is lost between tensors, as a share of them; the lower is nothing."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device that holds most."""

    terms: dict[str, int]
    """each thing at its largest, by name; not all are so at once"""
    host_terms: dict[str, int]
    """what the host keeps for this device"""
    total_bytes: int
    """tensors at the peak of a step"""
    low: float
    """with the runtime"""
    high: float
    """with the runtime, and what may be lost between tensors"""
    limit: float
    peak: str
    """the moment of the step at which most is held"""
    host_fits: bool


def memory_of(work: Work, where: Cluster) -> DeviceMemory:
    """What the fullest device of a run holds."""
    stage, held = of_first_stage(work)
    counted = step_memory(stage)
    terms = dict(counted.terms)
    more = 0
    if held > 1 and "activations" in terms:
        more = round((held - 1) * terms["activations"])
        terms["activations of further micro-batches"] = more
    total = counted.total_bytes + more
    host = sum(counted.host.values()) * min(where.per_node, where.devices)
    context = where.accelerator.context
    return DeviceMemory(
        terms,
        dict(counted.host),
        total,
        total + context,
        total * (1 + FRAGMENTS) + context,
        where.accelerator.memory,
        counted.moment,
        where.host_memory is None or host <= where.host_memory,
    )


def first_stage(work: Work) -> tuple[int, float]:
    """Layers of the process of a pipeline that has most, and for how many micro-batches the first one, which
    holds them longest, has their activations."""
    layout, layers = work.layout, work.config.num_hidden_layers
    if layout.pipeline == 1:
        return layers, 1.0
    each = layout.stages_each
    schedule = SCHEDULES[layout.pipeline_schedule]
    held = chunks_held(schedule, 0, layout.pipeline, work.accumulation, each) / each
    here = [0] * layout.pipeline
    for stage, blocks in enumerate(stages_of(work.config, layout.stages)):
        here[layout.place(stage)] += len(blocks)
    return max(here), held


def of_first_stage(work: Work) -> tuple[Work, float]:
    """The work of a pipeline's first process as if there were no others, and for how many micro-batches it
    holds activations. It has the longest stage, and the embedding or the head, not both."""
    layers, held = first_stage(work)
    if work.layout.pipeline == 1:
        return work, held
    config = replace(some_layers(work.config, 0, layers), tie_word_embeddings=True)
    alone = replace(work.layout, pipeline=1, pipeline_schedule="1f1b", pipeline_stages=None)
    return replace(work, config=config, layout=alone), held


def some_layers(config: ModelConfig, first: int, count: int) -> ModelConfig:
    """The model with so many of its layers only."""
    there = range(first, first + count)
    return replace(
        config,
        num_hidden_layers=count,
        layer_types=config.layer_types[first : first + count],
        moe_layers=tuple(layer - first for layer in config.moe_layers if layer in there),
    )
