"""Each part of a parameter has one process that counts and writes it, in every layout."""

from types import SimpleNamespace
from typing import Any

import pytest

from ropewalk.layout import DEGREES, Layout
from ropewalk.parallel.places import axes_of, first_with, replicas
from ropewalk.parallel.world import EXPERT_AXES

EXPERT = "blocks.0.mlp.experts.1.up_proj.weight"


def worlds(layout: Layout) -> list[Any]:
    """What places.py asks of the World of each process."""
    found = []
    for rank in range(layout.processes):
        indices, rest = {}, rank
        for axis in reversed(DEGREES):
            rest, indices[axis] = divmod(rest, getattr(layout, axis))
        rest = rank % layout.with_same_blocks
        for axis in reversed(EXPERT_AXES):
            rest, indices[axis] = divmod(rest, getattr(layout, axis))
        experts = object() if layout.expert > 1 else None
        found.append(
            SimpleNamespace(
                layout=layout, size=layout.processes, experts=experts, indices=indices, index=indices.get
            )
        )
    return found


@pytest.mark.parametrize(
    ("layout", "name", "kinds"),
    [
        (Layout(replicate=2, shard=2, tensor=2), "norm.weight", 2),
        (Layout(replicate=2, shard=2, tensor=2), "blocks.0.attention.q_proj.weight", 4),
        (Layout(replicate=2, shard=2, tensor=2), EXPERT, 2),
        (Layout(replicate=2, shard=2, tensor=2, expert=2), EXPERT, 4),  # of two experts two parts
        (Layout(replicate=2, shard=2, expert=4), EXPERT, 4),
        (Layout(pipeline=2, shard=2, context=2, expert=2), EXPERT, 2 * 4),  # of other blocks in each stage
        (Layout(pipeline=2, shard=2), "blocks.0.attention.q_proj.weight", 2 * 2),
        (Layout(pipeline=2, shard=2, tensor=2), "embed.weight", 4),  # both ends have it
    ],
)
def test_one_process_answers_for_each_part(layout: Layout, name: str, kinds: int) -> None:
    every = worlds(layout)
    assert sum(first_with(name, world) for world in every) == kinds
    (_, parts), groups = axes_of(name, every[0]), replicas(name, every[0])
    assert sorted(rank for alike in groups for rank in alike) == list(range(layout.processes))
    for alike in groups:
        assert len({tuple(every[rank].indices[axis] for axis in parts) for rank in alike}) == 1
