"""What the processes of a layout send each other in a step, collective by collective.

`step_time` puts seconds to these, and `traffic` adds up their bytes: closed forms, equal to what is counted
in real steps (`tests/parallel/test_volume.py`). A ring's count, of one process: (t - 1) / t of the tensor for
a gathering, a scattering or rows to single processes among t, twice that for adding up.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ropewalk.parallel.slices import is_expert
from ropewalk.plan.blocks import layer_kinds
from ropewalk.plan.weights import parameters
from ropewalk.plan.work import Work

GRADIENT = 4


@dataclass(frozen=True)
class Exchange:
    """A collective of one block and micro-batch, over `among` devices that are `stride` apart: how often
    forward, backward, and besides in a backward pass that runs the block again."""

    operation: str
    """one of `collectives`, or `ring`: parts go from each process to the next"""
    size: float
    """bytes, as in `collectives`; a ring's as those of a gathering"""
    among: int
    stride: int
    forward: float
    backward: float
    again: float
    beside: bool = False
    """while products are computed"""


def block_exchanges(work: Work, moe: bool, width: int) -> Iterator[Exchange]:
    """All of a block. width: bytes of a number of the hidden states."""
    layout, config = work.layout, work.config
    tensor, context = layout.tensor, layout.context
    numbers = work.own_tokens * config.hidden_size
    pairs = 1 if moe else 2  # whole experts get each process's own tokens
    if tensor > 1 and work.sequence_parallel:
        # of a block that runs again nothing needs the last result
        last = 1 if moe or config.norm_placement != "pre" else 0
        yield Exchange("all_gather", width * numbers, tensor, 1, pairs, pairs, pairs)
        yield Exchange("reduce_scatter", width * numbers, tensor, 1, pairs, pairs, pairs - 1 + last)
        # what entered a pair, for its weights' gradients, where the block does not run again; where those are
        # made apart it is read twice, but in the first stage, whose input needs no gradient
        reads = 2 - 1 / layout.stages if layout.split_backward else 1
        yield Exchange("all_gather", width * numbers, tensor, 1, 0, reads * pairs, -pairs, beside=True)
    elif tensor > 1:
        yield Exchange("all_reduce", width * numbers, tensor, 1, pairs, pairs, pairs)
    q, kv = (n * config.head_dim / tensor for n in (config.num_attention_heads, config.num_key_value_heads))
    if context > 1 and layout.context_exchange == "ulysses":
        yield Exchange("all_to_all", width * work.own_tokens * (q + 2 * kv), context, tensor, 1, 1, 1)
        yield Exchange("all_to_all", width * work.own_tokens * q, context, tensor, 1, 1, 1)
    elif context > 1:
        rows = 2 * kv * work.own_tokens * context
        there, back, hops = "all_gather", "reduce_scatter", context - 1
        if layout.context_exchange == "ring":  # gradients go all the way round
            there, back, hops = "ring", "ring", context
        yield Exchange(there, width * rows, context, tensor, 1, 1, 1)
        yield Exchange(back, GRADIENT * rows * hops / (context - 1), context, tensor, 0, 1, 0)
    if moe and layout.expert > 1:
        own = numbers / tensor if work.sequence_parallel else numbers
        yield Exchange("all_to_all", width * own * config.num_experts_per_tok, layout.expert, 1, 2, 2, 2)


def traffic(work: Work) -> dict[str, float]:
    """Bytes that a process sends in an optimizer step, on average over those of a pipeline, by kind:
    `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `ring`, and `sent` from stage to stage.

    Experts get as many rows each. Not counted: clipping, checks, validation, and what is under a kilobyte.
    """
    layout, config, m, width = work.layout, work.config, work.accumulation, work.parameter_bytes
    found: defaultdict[str, float] = defaultdict(float)

    def add(operation: str, size: float, among: int, times: float = 1) -> None:
        found[operation] += times * size * (1 - 1 / among) * (2 if operation == "all_reduce" else 1)

    weights = parameters(work)
    own = 1 / layout.pipeline  # of all blocks, and of what is at the two ends, on average
    apart = layout.pipeline > 1 and layout.place(layout.stages - 1) != layout.place(0)
    for unit in (weights.outside, *weights.blocks):
        # at stage 3 blocks are gathered for each pass, what is outside of them for each micro-batch
        times = own * (1 if layout.stage < 3 else m if unit is weights.outside else 2 * m)
        reduced = own * (1 if layout.stage == 1 else m)
        for p in unit:
            parts = layout.expert_parts if layout.expert > 1 and is_expert(p.name) else layout.parts
            twice = apart and config.tie_word_embeddings and p.name == "embed.weight"
            count = 2 * p.count if twice else p.count
            each = p.size * width if p.quantized == "none" else sum(p.quantized_bytes())
            add("all_gather", each * count, parts, times)
            if p.trained:
                gradient = work.reduce_bytes * p.size * count
                add("reduce_scatter", gradient, parts, reduced)
                add("all_reduce", gradient / parts, layout.replicate, reduced)
                if twice:
                    found["sent"] += own * gradient / parts
    for moe, _, count in layer_kinds(config):
        for one in block_exchanges(work, moe, width):
            times = own * m * count * (one.forward + one.backward + work.recomputed_share * one.again)
            add(one.operation, one.size, one.among, times)
    hidden = width * m * work.own_tokens * config.hidden_size
    # no gradient gets to an embedding that is frozen
    embeds = any(p.trained for p in weights.outside if p.name.startswith("embed"))
    add("all_reduce", hidden, layout.tensor, own)  # the embedding
    add("all_gather", hidden, layout.tensor, own * (1 + embeds))  # out of the last block, and into the first
    add("reduce_scatter", hidden, layout.tensor, own * embeds)
    hops = sum(layout.place(stage) != layout.place(stage + 1) for stage in range(layout.stages - 1))
    found["sent"] += own * 2 * hidden / layout.tensor * hops
    return {kind.replace("_", "-"): size for kind, size in found.items() if size}
