"""Messages over a network whose links they share, simulated: for what `collectives` has no formula.

Oversubscribed fat trees, rail-optimised clusters, tori; a slow or a dead link. A message flows over its
path's links all at once (a fluid, no packets), and links are shared max-min fair: no message can be faster
without slowing one that is no faster. It starts its path's latencies after what it waits for has arrived.

Where a network has several equally short ways, a message is spread over them evenly, and the switches of a
fat tree's core are one: routing is as good as it can be. A message whose ways are all cut goes by the
shortest that is left; where there is none it never arrives, and neither does what waits for it (infinity).
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ropewalk.errors import UserError
from ropewalk.plan.collectives import Link

Wire = tuple[Hashable, ...]
"""one link, one way: from, to, and a third where two run in parallel; a rank is its number"""
Path = tuple[Wire, ...]


@dataclass(frozen=True)
class Message:
    """`size` bytes from one rank to another, sent once the messages at the places `after` have arrived."""

    source: int
    target: int
    size: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Network:
    """Ranks 0 to `ranks` - 1, what joins them, and the ways that a message usually takes."""

    ranks: int
    links: dict[Wire, Link]
    usual: Callable[[int, int], list[Path]]

    def slowed(self, wire: Wire, factor: float) -> "Network":
        """With one link `factor` times as slow. UserError where it has no such link."""
        if factor <= 0:
            raise UserError(f"a link is slowed by a factor above 0; not {factor}")
        link = self._link(wire)
        slow = replace(link, seconds_per_byte=link.seconds_per_byte * factor)
        return replace(self, links={**self.links, wire: slow})

    def without(self, wire: Wire) -> "Network":
        """With one link (one way) dead. UserError where it has no such link."""
        self._link(wire)
        return replace(self, links={name: link for name, link in self.links.items() if name != wire})

    def paths(self, source: int, target: int) -> list[Path]:
        """The ways that share a message: the usual ones that are whole, else the shortest left, if any."""
        whole = [path for path in self.usual(source, target) if all(wire in self.links for wire in path)]
        return whole or self._detour(source, target)

    def _detour(self, source: int, target: int) -> list[Path]:
        found: dict[Hashable, Path] = {source: ()}
        todo: deque[Hashable] = deque([source])
        out: dict[Hashable, list[Wire]] = {}
        for wire in self.links:
            out.setdefault(wire[0], []).append(wire)
        while todo and target not in found:
            at = todo.popleft()
            for wire in out.get(at, ()):
                if wire[1] not in found:
                    found[wire[1]] = (*found[at], wire)
                    todo.append(wire[1])
        return [found[target]] if target in found else []

    def _link(self, wire: Wire) -> Link:
        if wire not in self.links:
            raise UserError(f"the network has no link {wire}; it has, for one, {next(iter(self.links))}")
        return self.links[wire]


def fat_tree(pods: int, hosts: int, link: Link, oversubscription: float = 1.0) -> Network:
    """`pods` switches with `hosts` ranks each, under one core: (rank, "pod k"), ("pod k", "core") and back.

    A pod's link to the core carries hosts / oversubscription times what a rank's does. The latency is a
    rank's sending link's, whatever the way. One pod is a plain switch.
    """
    if pods < 1 or hosts < 1 or oversubscription <= 0:
        raise UserError(
            "a fat tree has pods, hosts and an oversubscription, all above 0; "
            f"not {pods}, {hosts} and {oversubscription}"
        )
    down = Link(0.0, link.seconds_per_byte)
    trunk = Link(0.0, link.seconds_per_byte * oversubscription / hosts)
    links: dict[Wire, Link] = {}
    for pod in range(pods):
        links |= {(f"pod {pod}", "core"): trunk, ("core", f"pod {pod}"): trunk}
        for rank in range(pod * hosts, (pod + 1) * hosts):
            links |= {(rank, f"pod {pod}"): link, (f"pod {pod}", rank): down}

    def usual(source: int, target: int) -> list[Path]:
        here, there = f"pod {source // hosts}", f"pod {target // hosts}"
        middle: Path = () if here == there else ((here, "core"), ("core", there))
        return [((source, here), *middle, (there, target))]

    return Network(pods * hosts, links, usual)


def rails(nodes: int, gpus: int, inside: Link, rail: Link) -> Network:
    """Nodes of `gpus` ranks behind a switch each, and GPU i of every node on one more, "rail i":
    (rank, "node k"), (rank, "rail i") and back.

    To a GPU of another rail a message first goes, inside, to the GPU of that rail (NCCL's PXN).
    """
    if nodes < 1 or gpus < 1:
        raise UserError(f"a cluster has nodes and GPUs, one or more; not {nodes} and {gpus}")
    links: dict[Wire, Link] = {}
    for rank in range(nodes * gpus):
        for switch, link in ((f"node {rank // gpus}", inside), (f"rail {rank % gpus}", rail)):
            links |= {(rank, switch): link, (switch, rank): Link(0.0, link.seconds_per_byte)}

    def usual(source: int, target: int) -> list[Path]:
        def over(switch: str, a: int, b: int) -> Path:
            return () if a == b else ((a, switch), (switch, b))

        node = f"node {source // gpus}"
        if source // gpus == target // gpus:
            return [over(node, source, target)]
        relay = source // gpus * gpus + target % gpus
        return [over(node, source, relay) + over(f"rail {target % gpus}", relay, target)]

    return Network(nodes * gpus, links, usual)


def torus(dimensions: Sequence[int], link: Link) -> Network:
    """Ranks in row-major order; (rank, neighbour, "+0") is the link up the first side, "-0" that down it.

    A message goes along one side after the other, the shorter way round; half of it each way where both are.
    """
    if not dimensions or min(dimensions) < 1:
        raise UserError(f"a torus has sides of one rank or more; not {list(dimensions)}")
    sides = tuple(dimensions)
    places = list(itertools.product(*map(range, sides)))
    number = {place: rank for rank, place in enumerate(places)}

    def step(rank: int, side: int, way: int) -> tuple[int, int, str]:
        place = list(places[rank])
        place[side] = (place[side] + way) % sides[side]
        return (rank, number[tuple(place)], f"{'+' if way > 0 else '-'}{side}")

    def walk(rank: int, hops: Sequence[int]) -> Path:
        """`hops` along each side, below 0 for down."""
        path = []
        for side, count in enumerate(hops):
            for _ in range(abs(count)):
                path.append(step(rank, side, 1 if count > 0 else -1))
                rank = path[-1][1]
        return tuple(path)

    def usual(source: int, target: int) -> list[Path]:
        shortest = []
        for side, here, there in zip(sides, places[source], places[target], strict=True):
            up = (there - here) % side
            shortest.append([hops for hops in {up, up - side} if 2 * abs(hops) <= side])
        return [walk(source, hops) for hops in itertools.product(*shortest)]

    every = itertools.product(range(len(places)), range(len(sides)), (1, -1))
    links: dict[Wire, Link] = {step(rank, side, way): link for rank, side, way in every if sides[side] > 1}
    return Network(len(places), links, usual)


def ring(order: Sequence[int], n: float, operation: str = "all_reduce") -> list[Message]:
    """A ring's messages of n/p bytes among the ranks in `order`: p - 1 rounds, twice that for all_reduce.

    A rank sends in a round what it received in the one before, and one message at a time.
    """
    if operation not in ("all_reduce", "all_gather", "reduce_scatter"):
        raise UserError(f"{operation}: no ring's work; all_reduce, all_gather and reduce_scatter are")
    p = len(order)
    return [
        Message(
            order[i],
            order[(i + 1) % p],
            n / p,
            ((turn - 1) * p + (i - 1) % p, (turn - 1) * p + i) if turn else (),
        )
        for turn in range((p - 1) * (2 if operation == "all_reduce" else 1))
        for i in range(p)
    ]


def all_to_all(ranks: Sequence[int], n: float) -> list[Message]:
    """n/p bytes from everyone to everyone else, all at once."""
    return [Message(a, b, n / len(ranks)) for a in ranks for b in ranks if a != b]


def together(*collectives: Sequence[Message]) -> list[Message]:
    """Several at once, as one list: what each message waits for is counted on from where its list begins."""
    joined: list[Message] = []
    for messages in collectives:
        begin = len(joined)
        joined += [replace(each, after=tuple(begin + place for place in each.after)) for each in messages]
    return joined


def seconds(network: Network, messages: Sequence[Message]) -> float:
    """Until the last message has arrived: infinity where one is cut off."""
    return float(arrivals(network, messages).max()) if messages else 0.0


def arrivals(network: Network, messages: Sequence[Message]) -> np.ndarray:
    """When each message has arrived, in seconds; infinity for what is cut off and what waits for that.

    UserError for a message of no such rank or size, or one that waits for itself or a later one, and for a
    link without a bandwidth.
    """
    _check(network, messages)
    flows = _Flows(network, messages)
    arrived = np.full(len(messages), math.inf)
    waiting = [len(message.after) for message in messages]
    followers: list[list[int]] = [[] for _ in messages]
    for place, message in enumerate(messages):
        for earlier in message.after:
            followers[earlier].append(place)
    starts = [(flows.latency[place], place) for place, count in enumerate(waiting) if not count]
    heapq.heapify(starts)
    active = np.zeros(0, int)
    now = 0.0

    def arrive(place: int) -> None:
        arrived[place] = now
        for follower in followers[place]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(starts, (now + flows.latency[follower], follower))

    while active.size or starts:
        rate = flows.rates(active)
        need = flows.left[active] / rate
        step = float(need.min()) if active.size else math.inf
        if starts and starts[0][0] < now + step:
            step = max(0.0, starts[0][0] - now)
        if step == math.inf:
            break
        now += step
        flows.left[active] -= rate * step
        over = need <= step * (1 + 1e-9)  # by the time, not what is left: that may be lost in rounding
        for flow in active[over]:
            place = int(flows.message[flow])
            flows.open[place] -= 1
            if not flows.open[place]:
                arrive(place)
        fresh: list[int] = []
        while starts and starts[0][0] <= now * (1 + 1e-12):
            place = heapq.heappop(starts)[1]
            if flows.open[place]:
                fresh += range(flows.first[place], flows.first[place] + flows.open[place])
            else:
                arrive(place)
        active = np.append(active[~over], np.array(fresh, int))
    return arrived


class _Flows:
    """The messages' flows, one for each of a message's ways, and the links that each is on."""

    def __init__(self, network: Network, messages: Sequence[Message]) -> None:
        number = {wire: index for index, wire in enumerate(network.links)}
        self.room = np.array([1 / link.seconds_per_byte for link in network.links.values()])
        self.latency: list[float] = []
        """of each message; infinite where it has no way"""
        self.open: list[int] = []
        """flows of each message that have not arrived, which are numbered on from its `first`"""
        self.first: list[int] = []
        owner: list[int] = []
        size: list[float] = []
        hops: list[list[int]] = []
        for place, message in enumerate(messages):
            local = message.source == message.target
            paths: list[Path] = [()] if local else network.paths(message.source, message.target)
            lags = [sum(network.links[wire].latency for wire in path) for path in paths]
            self.latency.append(max(lags, default=math.inf))
            moving = [path for path in paths if path and message.size]
            self.open.append(len(moving))
            self.first.append(len(owner))
            for path in moving:
                owner.append(place)
                size.append(message.size / len(moving))
                hops.append([number[wire] for wire in path])
        self.message, self.size = np.array(owner, int), np.array(size)
        self.left = self.size.copy()
        self.count = np.array([len(path) for path in hops], int)
        self.begin = np.cumsum(self.count) - self.count
        self.wires = np.array(list(itertools.chain.from_iterable(hops)), int)

    def rates(self, active: np.ndarray) -> np.ndarray:
        """Bytes per second, max-min fair: the tightest link is shared out among its flows, then what is left
        of the others (progressive filling: Bertsekas and Gallager, "Data Networks", 6.5.2)."""
        count = self.count[active]
        flow = np.repeat(np.arange(active.size), count)
        wire = self.wires[
            np.repeat(self.begin[active] - np.cumsum(count) + count, count) + np.arange(flow.size)
        ]
        rate, room, unset = np.zeros(active.size), self.room.copy(), np.ones(active.size, bool)
        while flow.size:
            users = np.bincount(wire, minlength=room.size)
            share = np.divide(room, users, out=np.full(room.size, math.inf), where=users > 0)
            least = share.min()
            unset[flow[share[wire] <= least * (1 + 1e-9)]] = False
            rate[flow[~unset[flow]]] = least
            room -= least * np.bincount(wire[~unset[flow]], minlength=room.size)
            flow, wire = flow[unset[flow]], wire[unset[flow]]
        return rate


def _check(network: Network, messages: Sequence[Message]) -> None:
    if any(link.seconds_per_byte == 0 for link in network.links.values()):
        raise UserError("a simulated link takes some time per byte; this network has one of 0 seconds")
    for place, message in enumerate(messages):
        if not (0 <= message.source < network.ranks and 0 <= message.target < network.ranks):
            raise UserError(
                f"message {place} is from {message.source} to {message.target}, of {network.ranks} ranks"
            )
        if not 0 <= message.size < math.inf:
            raise UserError(f"message {place} has {message.size} bytes")
        if any(not 0 <= earlier < place for earlier in message.after):
            raise UserError(f"message {place} waits for {message.after}, which are not all before it")
