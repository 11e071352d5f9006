"""All layouts of a run on a cluster: those that fit, ranked; and what would make one fit that does not."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from ropewalk.layout import Layout, Schedule
from ropewalk.plan.estimates import Estimate, point
from ropewalk.plan.failures import Operation, expected
from ropewalk.plan.hardware import Cluster
from ropewalk.plan.memory import memory_of
from ropewalk.plan.sizes import parameters
from ropewalk.plan.sketch import Sketch
from ropewalk.plan.step_time import BlockTime, StepTime, blocks_of, step_time
from ropewalk.plan.work import Work

By = Literal["time", "cost", "goodput"]
Vary = Literal["precision", "adaptation"]
"""What changes the result of a training, and is searched only where it is asked for."""
MICRO = (1, 2, 4, 8, 16)
SLACK = 1.1
"""What the sketch may be wrong by."""
DISK = 2e9
"""Bytes/s that a node writes of a checkpoint."""
MOST = 8
"""Changes that are put together to make a run fit."""
LONG = 8192
"""Rows of fewer tokens are not worth dividing."""


def layouts(work: Work, where: Cluster) -> Iterator[Layout]:
    """Every way to divide the model over the devices that this project can run and that could be best."""
    config, devices = work.config, where.devices
    sizes = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    near = min(where.per_node, devices)
    tensors = [
        t for t in _powers(near) if all(size % t == 0 for size in sizes) and work.sequence_length % t == 0
    ]
    contexts = (
        [c for c in _powers(16) if work.sequence_length % (2 * c) == 0]
        if work.sequence_length >= LONG
        else [1]
    )
    pipelines = [
        p
        for p in range(1, config.num_hidden_layers + 1)
        if devices % p == 0 and _worth(p, config.num_hidden_layers)
    ]
    experts = (
        [e for e in _powers(config.num_experts) if config.num_experts % e == 0] if config.num_experts else [1]
    )
    for tensor, context, pipeline, expert in product(tensors, contexts, pipelines, experts):
        rest, odd = divmod(devices, tensor * context * pipeline)
        if odd or rest == 0 or rest * context * tensor % expert:
            continue
        schedules: list[tuple[Schedule, int]] = [("1f1b", 1)]
        if pipeline > 1:
            schedules += [
                ("interleaved-1f1b", v) for v in (2, 3, 4) if pipeline * v <= config.num_hidden_layers
            ]
        for shard in _shards(rest, where.per_node // tensor):
            for stage in (1, 3) if shard * context > 1 and pipeline == 1 else (1,):
                for schedule, each in schedules:
                    yield Layout(
                        pipeline=pipeline,
                        replicate=rest // shard,
                        shard=shard,
                        context=context,
                        tensor=tensor,
                        expert=expert,
                        stage=stage,
                        pipeline_schedule=schedule,
                        pipeline_stages=each if pipeline > 1 else None,
                    )


def _powers(most: int) -> list[int]:
    return [2**i for i in range(max(1, most).bit_length()) if 2**i <= most]


def _worth(pipeline: int, layers: int) -> bool:
    """Whether the longest stage is at most an eighth longer than the mean: else a smaller degree is as
    fast."""
    return -(-layers // pipeline) * pipeline <= 1.125 * layers


def _shards(rest: int, near: int) -> list[int]:
    """All of them, those of a node, none."""
    return sorted({rest, *(n for n in (max(1, near), 8 * max(1, near)) if rest % n == 0), 1}, reverse=True)


def variants(work: Work, where: Cluster) -> Iterator[Work]:
    """Layouts, micro-batches and savers; the rows of a step stay what they are."""
    rows = work.batch_size
    for layout in layouts(work, where):
        own, odd = divmod(rows, layout.data)
        if odd or not own:
            continue
        for micro in MICRO:
            if own % micro or (own // micro < layout.pipeline and layout.pipeline > 1):
                continue
            if layout.pipeline_schedule == "interleaved-1f1b" and (own // micro) % layout.pipeline:
                continue
            for saver in ("none", "selective", "full"):
                yield replace(
                    work,
                    layout=layout,
                    micro_batch_size=micro,
                    accumulation=own // micro,
                    checkpointing=saver,
                    checkpointing_every=1,
                    checkpointing_budget=None,
                )


def alternatives(work: Work, where: Cluster, vary: Collection[Vary]) -> list[Work]:
    """The run as it is, and in other precisions that the device has, and with more or less of it trained."""
    kinds: list[dict[str, Any]] = [{}]
    if "precision" in vary:
        kinds = [{"precision": p} for p in ("float8", "bfloat16", "float32") if p in where.accelerator.peak]
    if "adaptation" in vary:
        trained = [("full", "none"), ("lora", "none"), ("lora", "int8"), ("lora", "nf4")]
        kinds = [{**kind, "method": m, "quantize": q} for kind in kinds for m, q in trained]
    return list(dict.fromkeys([work, *(replace(work, **kind) for kind in kinds)]))


def search(
    work: Work,
    where: Cluster,
    by: By = "time",
    count: int = 5,
    accept: Callable[[Work], bool] = lambda work: True,
    vary: Collection[Vary] = (),
) -> list[Estimate]:
    """The best ways to do the same step, best first; at most `count`, none where nothing fits.

    The optimizer's states are in the hosts' memory only where nothing fits without. vary: see `alternatives`.
    accept: says no to what must not be. by: time; cost, for which fewer devices count too; or goodput, the
    tokens of a day in which some fail. What cannot fit is left out by a sketch, the time of blocks computed
    once for each (tensor, context, expert, micro-batch, saver), and what is left counted exactly, the
    fastest first. Of those that differ in savers, micro-batch, stages and how they shard only the best is
    given.
    """
    clusters = [where] if by == "time" else [where.of(n) for n in _fewer(where)]
    works = alternatives(work, where, vary)
    ranked = sorted(
        (found for one in works for some in clusters for found in _roughly(one, some)),
        key=lambda found: _price(found, by),
    )
    best: dict[Any, Estimate] = {}
    for one, some, time in ranked:
        layout = one.layout
        kind = (one.precision, one.method, one.quantize)
        key = (some.devices, layout.tensor, layout.context, layout.pipeline, layout.expert, kind)
        if key in best:
            continue
        found = Estimate(one, some, time, memory_of(one, some))
        if found.fits and accept(one):
            best[key] = found
            if len(best) == count:
                break
    if not best and not work.offload and work.device == "cuda":
        return search(replace(work, offload=True), where, by, count, accept, vary)
    return list(best.values())


def _roughly(work: Work, where: Cluster) -> Iterator[tuple[Work, Cluster, StepTime]]:
    """What may fit, with its time."""
    sketch, known = Sketch(where), dict[tuple[Any, ...], BlockTime]()
    for one in variants(work, where):
        if sketch.bytes(one) > SLACK * where.accelerator.memory:
            continue
        layout = one.layout
        key = (layout.tensor, layout.context, layout.expert, one.micro_batch_size, one.checkpointing)
        if key not in known:
            known[key] = blocks_of(one, where)
        yield one, where, step_time(one, where, known[key])


def _fewer(where: Cluster) -> list[int]:
    """Sizes of the cluster: all of it, and halves down to a node or a device."""
    return [n for n in (where.devices // 2**i for i in range(where.devices.bit_length())) if n >= 1]


def _price(found: tuple[Work, Cluster, StepTime], by: By) -> float:
    """What the search makes least: seconds of a step, device-seconds, or seconds with what failures cost."""
    work, where, time = found
    if by == "cost":
        return time.seconds * where.devices
    if by == "goodput":
        state = 16 * parameters(work.config) / where.nodes  # bytes of a checkpoint that a node writes
        run = Operation(where.devices, save=max(1.0, state / DISK))
        return time.seconds / max(1e-9, expected(run).goodput)
    return time.seconds


@dataclass(frozen=True)
class Fix:
    """One change of a recipe that makes a run smaller."""

    change: str
    """as an override of the recipe"""
    saved: float
    """bytes of the device that holds most"""
    slower: float
    """share of the step's time that it costs; below 0: it is faster"""
    fits: bool


def fixes(work: Work, where: Cluster) -> list[Fix]:
    """Changes of a recipe that save memory: what is enough first, the cheapest of it before all.

    Each by itself; and where none is enough, one after the other until they are, if they ever are.
    """
    before = point(work, where)
    tried = _tried(work, before, where)
    singles = sorted((fix for fix, _ in tried), key=lambda fix: (not fix.fits, fix.slower))
    if not tried or singles[0].fits:
        return singles
    done: list[str] = []
    for _ in range(MOST):
        if not tried:
            break
        # what saves most for what it costs
        fix, work = max(tried, key=lambda one: one[0].saved / (0.02 + max(0.0, one[0].slower)))
        done.append(fix.change)
        after = point(work, where)
        if after.fits:
            saved = before.memory.high - after.memory.high
            slower = after.step_seconds / before.step_seconds - 1
            return [Fix(" ".join(done), saved, slower, True), *singles]
        tried = _tried(work, after, where)
    return singles


def _tried(work: Work, before: Estimate, where: Cluster) -> list[tuple[Fix, Work]]:
    found = []
    for change, other in _changes(work):
        after = point(other, where)
        saved = before.memory.high - after.memory.high
        if saved > 0.005 * before.memory.limit:
            slower = after.step_seconds / before.step_seconds - 1
            found.append((Fix(change, saved, slower, after.fits), other))
    return found


def _changes(work: Work) -> Iterator[tuple[str, Work]]:
    micro = work.micro_batch_size
    if micro > 1:
        for smaller in (micro // 2, 1):
            if micro % smaller == 0:
                other = replace(
                    work, micro_batch_size=smaller, accumulation=work.accumulation * micro // smaller
                )
                yield f"train.micro_batch_size={smaller}", other
    if work.checkpointing == "none":
        yield "train.checkpointing=selective", replace(work, checkpointing="selective")
    if work.checkpointing != "full":
        yield "train.checkpointing=full", replace(work, checkpointing="full")
    if work.checkpointing == "full" and not work.activation_offload:
        yield "train.activation_offload=true", replace(work, activation_offload=True)
    if work.loss_chunk > 256:
        yield "train.loss_chunk=256", replace(work, loss_chunk=256)
    if work.method == "full":
        if work.state_bits == 32 and work.optimizer in ("adamw", "lion") and work.layout.parts == 1:
            yield "train.optimizer.state_bits=8", replace(work, state_bits=8)
        if work.masters and work.precision != "float32":
            yield "train.optimizer.masters=false", replace(work, masters=False)
        if not work.offload:
            yield "train.optimizer.offload=true", replace(work, offload=True)
        yield "adapt.method=lora", replace(work, method="lora")
        yield "adapt.method=lora adapt.quantize=nf4", replace(work, method="lora", quantize="nf4")
    elif work.method == "lora" and work.quantize != "nf4":
        if work.quantize == "none":
            yield "adapt.quantize=int8", replace(work, quantize="int8")
        yield "adapt.quantize=nf4", replace(work, quantize="nf4")
    if work.sequence_length > 1024:
        half = work.sequence_length // 2
        other = replace(
            work, sequence_length=half, micro_batch_size=micro, accumulation=2 * work.accumulation
        )
        yield f"data.sequence_length={half}", other
