"""Which processes have what of a parameter: the one rule that gradient norms, checkpoints and the comparison
of replicas follow."""

from ropewalk.parallel.slices import is_expert, sliced_along
from ropewalk.parallel.world import World


def axes_of(name: str, world: World) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of the mesh along which processes have the same of a parameter, and those along which they have
    different parts of it. Along the others (`pipeline`, `expert`) they have other parameters."""
    if world.experts is not None and is_expert(name):
        return ("expert_copies",), ("expert_parts",)
    # both ends of a pipeline have an embedding that is the head, too
    ends = ("pipeline",) if name == "embed.weight" else ()
    if sliced_along(name) is None:
        return ("replicate", "tensor", *ends), ("shard", "context")
    return ("replicate", *ends), ("shard", "context", "tensor")


def first_with(name: str, world: World, whole: bool = False) -> bool:
    """Whether this process is the first with its part of a parameter, or (`whole`) with any: the one that
    counts and writes it."""
    copies, parts = axes_of(name, world)
    return not any(world.index(axis) for axis in (copies + parts if whole else copies))


def replicas(name: str, world: World) -> list[list[int]]:
    """The ranks that have the same part of a parameter, for each part, if they have the parameter at all."""
    size, layout = world.layout.with_same_blocks, world.layout
    (axis, *_), _ = axes_of(name, world)
    step = size // int(getattr(layout, axis))
    return [[rank for rank in range(world.size) if rank % size % step == part] for part in range(step)]
