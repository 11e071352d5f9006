"""What a group of devices of a cluster is joined by, and the seconds that a collective takes on it."""

from functools import lru_cache

from ropewalk.plan.collectives import (
    Level,
    Link,
    best,
    hierarchical,
    torus_all_gather,
    torus_all_reduce,
    torus_all_to_all,
)
from ropewalk.plan.hardware import Cluster


def inside(cluster: Cluster) -> Link:
    """One device to another of its node."""
    device = cluster.accelerator
    return Link(device.latency, 1 / (device.link * device.link_share))


def between(cluster: Cluster) -> Link:
    """One device's share of the network between nodes."""
    device = cluster.accelerator
    return Link(device.network_latency, 1 / (cluster.network * device.network_share))


@lru_cache(maxsize=65536)
def collective(operation: str, n: float, cluster: Cluster, size: int, stride: int) -> float:
    """Seconds of `operation` over `size` devices that are `stride` apart, as fast as it can be done.

    n: bytes of the whole tensor, as in `collectives`. `send` is from one stage of a pipeline to the next.
    """
    if size == 1 or not n:
        return 0.0
    if cluster.torus and size > 2 and operation != "send":
        return _on_torus(operation, n, cluster, size)
    here = max(1, min(size, cluster.per_node // stride))
    if operation == "send":
        return best(
            "send", n, 2, inside(cluster) if size * stride <= cluster.per_node else between(cluster)
        ).seconds
    if here == size:
        return best(operation, n, size, inside(cluster)).seconds
    levels = Level(here, inside(cluster)), Level(-(-size // here), between(cluster))
    return hierarchical(operation, n, *levels).seconds


def _on_torus(operation: str, n: float, cluster: Cluster, size: int) -> float:
    """A group is laid out as a block of the torus, as near a cube as it goes."""
    sides, left = [], size
    for dimensions in range(len(cluster.torus), 0, -1):
        side = max(one for one in range(1, left + 1) if left % one == 0 and one**dimensions <= left)
        sides.append(side)
        left //= side
    sides[-1] *= left
    block = [side for side in sides if side > 1]
    if operation == "all_reduce":
        return torus_all_reduce(n, block, inside(cluster))
    if operation == "all_to_all":
        return torus_all_to_all(n, block, inside(cluster))
    return torus_all_gather(n, block, inside(cluster))
