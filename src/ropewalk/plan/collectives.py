"""Seconds that a collective takes: closed formulas of a latency and a time per byte (the Hockney model).

Everywhere `n` is the bytes of the *full* tensor: what all-gather ends with and reduce-scatter begins with
on every rank, what all-reduce and broadcast hold on every rank. For all-to-all it is the bytes that each
rank holds, of which it sends n/p to each of the p ranks (itself among them). Sending and receiving go on
at once, one message each at a time, over a network that is no narrower than its ends (for one that is, see
`network_simulator`). Adding up costs nothing. One rank, or no bytes, cost nothing.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005)
for ring, recursive doubling and halving, Bruck, pairwise; Sanders, Speck, Traff, "Two-Tree Algorithms for
Full Bandwidth Broadcast, Reduction and Scan" (2009) for chain and two-tree; NCCL's choice: its `tuning.cc`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ropewalk.errors import UserError


@dataclass(frozen=True)
class Link:
    """What lies between two ranks: seconds before a message's first byte, and seconds for each byte.

    Both are for one rank, one way: of a card that eight GPUs share, each has eight times the time per byte.
    """

    latency: float
    seconds_per_byte: float

    def __post_init__(self) -> None:
        if not (0 <= self.latency < math.inf and 0 <= self.seconds_per_byte < math.inf):
            raise UserError(f"a link's latency and time per byte are finite seconds, 0 or more; not {self}")


class Choice(NamedTuple):
    """The fastest algorithm and what it takes."""

    algorithm: str
    seconds: float


@dataclass(frozen=True)
class Level:
    """One level of a cluster: how many it joins, and over what."""

    ranks: int
    link: Link


def _nothing(n: float, p: int) -> bool:
    """Whether there is nothing to send; UserError where the question makes no sense (NaN included)."""
    if not 0 <= n < math.inf:
        raise UserError(f"a collective moves 0 bytes or more; {n} is no number of bytes")
    if p < 1 or p != int(p):
        raise UserError(f"a collective has one rank or more; {p} is no number of ranks")
    return p == 1 or n == 0


def _lg(p: int) -> int:
    """Rounds in which one rank's word reaches p: log2 p, rounded up."""
    return (p - 1).bit_length()


def send(n: float, p: int, link: Link) -> float:
    """From one rank to another (point to point): a + nb, whatever p is beyond 1."""
    return 0.0 if _nothing(n, p) else link.latency + n * link.seconds_per_byte


def ring_all_gather(n: float, p: int, link: Link) -> float:
    """(p-1) a + nb (p-1)/p: each rank passes on n/p bytes, p-1 times."""
    return 0.0 if _nothing(n, p) else (p - 1) * (link.latency + n / p * link.seconds_per_byte)


def ring_all_reduce(n: float, p: int, link: Link) -> float:
    """2(p-1) a + 2nb (p-1)/p: a reduce-scatter and an all-gather."""
    return 2 * ring_all_gather(n, p, link)


def recursive_doubling_all_reduce(n: float, p: int, link: Link) -> float:
    """lg p (a + nb): everything is exchanged with a partner twice as far off each time.

    Where p is not a power of two, the surplus ranks first give theirs away and are told the result last:
    two messages more, over the next lower power.
    """
    if _nothing(n, p):
        return 0.0
    rounds = p.bit_length() - 1
    return (rounds if p == 1 << rounds else rounds + 2) * (link.latency + n * link.seconds_per_byte)


def halving_doubling_all_reduce(n: float, p: int, link: Link) -> float:
    """2 lg p a + 2nb (p-1)/p (Rabenseifner): recursive halving, then doubling; surplus ranks as above."""
    if _nothing(n, p):
        return 0.0
    rounds = p.bit_length() - 1
    power = 1 << rounds
    seconds = 2 * (rounds * link.latency + n * link.seconds_per_byte * (power - 1) / power)
    return seconds if p == power else seconds + 2 * (link.latency + n * link.seconds_per_byte)


def doubling_all_gather(n: float, p: int, link: Link) -> float:
    """lg p a + nb (p-1)/p: recursive doubling; Bruck's where p is no power of two (NCCL's PAT)."""
    return 0.0 if _nothing(n, p) else _lg(p) * link.latency + n * link.seconds_per_byte * (p - 1) / p


def chain_segments(n: float, p: int, link: Link) -> int:
    """Into how many parts a chain best cuts n bytes: sqrt((p-2) nb/a), to the better whole number of parts
    of a byte or more."""
    if _nothing(n, p):
        return 1
    most = max(1, int(n))
    if link.latency == 0:
        return most
    k = min(most, int(math.sqrt((p - 2) * n * link.seconds_per_byte / link.latency)))
    return min((max(1, k), min(most, k + 1)), key=lambda k: chain_broadcast(n, p, link, k))


def chain_broadcast(n: float, p: int, link: Link, segments: int | None = None) -> float:
    """(p-2+k) (a + nb/k): along a chain of p ranks in k segments (None: the best number of them)."""
    if _nothing(n, p):
        return 0.0
    k = segments or chain_segments(n, p, link)
    return (p - 2 + k) * (link.latency + n * link.seconds_per_byte / k)


def chain_all_reduce(n: float, p: int, link: Link) -> float:
    """Twice a chain's broadcast: added up towards one end, then sent back."""
    return 2 * chain_broadcast(n, p, link)


def two_tree_broadcast(n: float, p: int, link: Link) -> float:
    """nb + 2 lg p a + sqrt(8 a b n lg p): half of it down each of two binary trees, in packets.

    The best number of packets is real here; `trees.steps` has the whole steps. A reduction takes as long.
    """
    if _nothing(n, p):
        return 0.0
    latency, transfer = _lg(p) * link.latency, n * link.seconds_per_byte
    return transfer + 2 * latency + math.sqrt(8 * latency * transfer)


def two_tree_all_reduce(n: float, p: int, link: Link) -> float:
    """Twice a two-tree's broadcast: up, then down."""
    return 2 * two_tree_broadcast(n, p, link)


def bruck_all_to_all(n: float, p: int, link: Link) -> float:
    """lg p (a + nb/2): each round sends on half of what is held."""
    return 0.0 if _nothing(n, p) else _lg(p) * (link.latency + n * link.seconds_per_byte / 2)


Seconds = Callable[[float, int, Link], float]
Algorithms = Mapping[str, Mapping[str, Seconds]]

ALGORITHMS: Algorithms = {
    "send": {"send": send},
    "all_reduce": {
        "ring": ring_all_reduce,
        "two_tree": two_tree_all_reduce,
        "recursive_doubling": recursive_doubling_all_reduce,
        "halving_doubling": halving_doubling_all_reduce,
        "chain": chain_all_reduce,
    },
    "all_gather": {"ring": ring_all_gather, "doubling": doubling_all_gather},
    "reduce_scatter": {"ring": ring_all_gather, "halving": doubling_all_gather},
    "broadcast": {"chain": chain_broadcast, "two_tree": two_tree_broadcast},
    "all_to_all": {"pairwise": ring_all_gather, "bruck": bruck_all_to_all},
}
"""operation -> algorithm -> seconds. Recursive halving costs what recursive doubling does (for p not a power
of two, too, by Bruck's reversed), and pairwise exchange what a ring does: p-1 messages of n/p."""

NCCL: Algorithms = {
    "send": ALGORITHMS["send"],
    "all_reduce": {"ring": ring_all_reduce, "two_tree": two_tree_all_reduce},
    "all_gather": {"ring": ring_all_gather},
    "reduce_scatter": {"ring": ring_all_gather},
    "broadcast": {"chain": chain_broadcast},
    "all_to_all": {"pairwise": ring_all_gather},
}
"""what NCCL chooses among, in-network reduction apart; not its PAT all-gather, which has one GPU per node"""


def best(operation: str, n: float, p: int, link: Link, algorithms: Algorithms = NCCL) -> Choice:
    """The fastest for this size, as NCCL chooses; the first of equals. UserError for an unknown operation."""
    if operation not in algorithms:
        raise UserError(f"{operation}: no collective; there is {', '.join(algorithms)}")
    name, seconds = "", math.inf
    for candidate, cost in algorithms[operation].items():
        took = cost(n, p, link)
        if took < seconds:
            name, seconds = candidate, took
    return Choice(name, seconds)


def hierarchical(
    operation: str, n: float, inside: Level, between: Level, algorithms: Algorithms = NCCL
) -> Choice:
    """all_reduce, all_gather, reduce_scatter or all_to_all over `between.ranks` nodes of `inside.ranks` GPUs;
    `between.link` is one GPU's share of its node's network cards.

    "phases": inside and between in turn, GPUs of one number talking to each other across nodes (for
    all-reduce: reduce-scatter inside, all-reduce of n/p_in between, all-gather inside).
    "rails": one ring through all GPUs per network card, run through at once, so that the slower of the two
    levels decides; its latency grows with the number of GPUs. "direct": an all-to-all with no stop on the
    way, whose inside and outside go on at once. UserError for another operation.
    """
    if operation not in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        raise UserError(f"{operation}: not done in levels, as all_reduce, all_gather and their like are")
    if _nothing(n, inside.ranks) | _nothing(n, between.ranks):
        level = between if inside.ranks == 1 else inside
        return best(operation, n, level.ranks, level.link, algorithms)
    phases = _phases(operation, n, inside, between, algorithms)
    if operation == "all_to_all":
        other = Choice("direct", _direct(n, inside, between))
    else:
        other = Choice("rails", _rails(n, inside, between) * (2 if operation == "all_reduce" else 1))
    return phases if phases.seconds <= other.seconds else other


def _phases(operation: str, n: float, inside: Level, between: Level, algorithms: Algorithms) -> Choice:
    def near(what: str) -> float:
        return best(what, n, inside.ranks, inside.link, algorithms).seconds

    # of an all-to-all every byte may have to leave the node; else 1/p_in of them is this GPU's to carry
    far_bytes = n if operation == "all_to_all" else n / inside.ranks
    far = best(operation, far_bytes, between.ranks, between.link, algorithms)
    within = near("reduce_scatter") + near("all_gather") if operation == "all_reduce" else near(operation)
    return Choice(f"phases, {far.algorithm} between nodes", within + far.seconds)


def _rails(n: float, inside: Level, between: Level) -> float:
    """One way round (p-1 of p parts). A ring of n/p_in bytes leaves a node over each card; of its p hops
    p_out are between nodes, so a GPU passes p_in - 1 of its p_in rings on inside."""
    p = inside.ranks * between.ranks
    slower = (
        max(inside.link.seconds_per_byte * (inside.ranks - 1), between.link.seconds_per_byte) / inside.ranks
    )
    crossings = between.ranks - 1
    latency = crossings * between.link.latency + (p - 1 - crossings) * inside.link.latency
    return latency + n * slower * (p - 1) / p


def _direct(n: float, inside: Level, between: Level) -> float:
    p = inside.ranks * between.ranks
    near, far = inside.ranks - 1, p - inside.ranks
    transfer = max(near * inside.link.seconds_per_byte, far * between.link.seconds_per_byte) * n / p
    return near * inside.link.latency + far * between.link.latency + transfer


def torus_all_reduce(n: float, dimensions: Sequence[int], link: Link) -> float:
    """2n (p-1)/p over the sum of a rank's one-way links, and 2 sum(d-1) latencies, for equal sides.

    `link` is one of the links, one way; a rank has two along a side. n is cut in one part per link; each is
    reduce-scattered along all sides, beginning with its own, and gathered back, so that all links are always
    busy (Jain and Sabharwal, "Optimal Bucket Algorithms for Large MPI Collectives on Torus Interconnects",
    2010). Unequal sides wait for the longest in each phase.
    """
    return 2 * torus_all_gather(n, dimensions, link)


def torus_all_gather(n: float, dimensions: Sequence[int], link: Link) -> float:
    """Half of an all-reduce; a reduce-scatter takes as long."""
    if _nothing(n, _torus_ranks(dimensions)):
        return 0.0
    sides = [d for d in dimensions if d > 1]
    parts = [n / (2 * len(sides))] * len(sides)  # bytes of the one that begins with each side
    seconds = 0.0
    for phase in range(len(sides)):
        along = sides[phase:] + sides[:phase]
        parts = [part / d for d, part in zip(along, parts, strict=True)]
        steps = [link.latency + part * link.seconds_per_byte for part in parts]
        seconds += max((d - 1) * step for d, step in zip(along, steps, strict=True))
    return seconds


def torus_all_to_all(n: float, dimensions: Sequence[int], link: Link) -> float:
    """nb d/8 for the longest (even) side d, and a latency per hop to the far corner: the bisection's limit.

    By shortest ways a byte crosses d/4 links of a side of d, (d*d-1)/(4d) where d is odd; each rank has two
    links for it. All but the slowest dimension wait.
    """
    if _nothing(n, _torus_ranks(dimensions)):
        return 0.0
    hops = max(d * d // 4 / d for d in dimensions)
    return n * link.seconds_per_byte * hops / 2 + link.latency * sum(d // 2 for d in dimensions)


def torus_bisection(dimensions: Sequence[int], bandwidth: float) -> float:
    """Bytes per second, one way, between the halves of a torus cut across its longest side: two cuts, as
    it wraps around. TPU v4 (arXiv 2304.01433), 16 a side, 50 GB/s a link: 2 x 16 x 16 x 50 = 25.6 TB/s."""
    ranks = _torus_ranks(dimensions)
    return 0.0 if ranks == 1 else 2 * ranks / max(dimensions) * bandwidth


def _torus_ranks(dimensions: Sequence[int]) -> int:
    if not dimensions or any(d < 1 or d != int(d) for d in dimensions):
        raise UserError(f"a torus has sides of one rank or more; these are {list(dimensions)}")
    return math.prod(dimensions)
