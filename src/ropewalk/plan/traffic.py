"""Bytes that a step sends, by kind of collective: closed forms, equal to what is counted in real steps.

A ring's count, of one process: (t - 1) / t of the tensor for a gathering or a scattering among t, twice that
for adding up. Gradients travel in float32. `tests/parallel/test_volume.py` counts a real step of each layout.
"""

from ropewalk.plan.sizes import parameters
from ropewalk.plan.work import Work

GRADIENT = 4


def traffic(work: Work) -> dict[str, float]:
    """Bytes of an optimizer step: `all-gather`, `reduce-scatter` and `all-reduce` of each process; `sent`
    from stage to stage by all processes of a pipeline together. Every weight trained, none in a mixture;
    `context_exchange: all_gather` where rows are divided."""
    layout, config, m = work.layout, work.config, work.accumulation
    width, layers = work.parameter_bytes, config.num_hidden_layers
    whole = parameters(config) / (layout.tensor * layout.pipeline)
    ends = 1 if config.tie_word_embeddings else 2
    outside = (ends * config.vocab_size + 1) * config.hidden_size / layout.tensor
    hidden = width * m * work.own_tokens * config.hidden_size
    found = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "sent"), 0.0)
    ring = 1 - 1 / layout.parts
    if layout.stage == 3:  # weights of blocks twice for each micro-batch, what is outside of them once
        found["all-gather"] += ring * m * width * (2 * whole - outside)
    else:
        found["all-gather"] += ring * width * whole
    found["reduce-scatter"] += ring * GRADIENT * whole * (1 if layout.stage == 1 else m)
    found["all-reduce"] += 2 * (1 - 1 / layout.replicate) * m * GRADIENT * whole / layout.parts
    if layout.tensor > 1:  # in each block two forward and two backward; and at both ends
        share = 1 - 1 / layout.tensor
        found["all-gather"] += share * hidden * (4 * layers + 2)
        found["reduce-scatter"] += share * hidden * (4 * layers + 1)
    if layout.context > 1:  # keys and values of whole rows, forward and backward, and their gradients
        heads = config.num_key_value_heads * config.head_dim / layout.tensor
        rows = 2 * heads * m * work.micro_batch_size * work.sequence_length * layers
        found["all-gather"] += 2 * (1 - 1 / layout.context) * width * rows
        found["reduce-scatter"] += (1 - 1 / layout.context) * GRADIENT * rows
    if layout.pipeline > 1:
        hops = sum(layout.place(stage) != layout.place(stage + 1) for stage in range(layout.stages - 1))
        found["sent"] += 2 * hidden * hops
        if config.tie_word_embeddings and layout.place(layout.stages - 1) != layout.place(0):
            found["sent"] += 2 * GRADIENT * config.vocab_size * config.hidden_size
    return {kind: size for kind, size in found.items() if size}
