"""Pipeline schedules, run event by event: what a step takes, how much of it is bubble, what each rank holds.

A model of p ranks with v chunks each is cut in p v stages. A micro-batch needs on each stage a forward F, a
backward for the input B, and one for the weights W. A schedule is the order of these on each rank; here every
one starts as soon as its rank is free and what it needs has arrived. Sending takes `send` seconds and
occupies nobody (asynchronous point to point); add it to F and B where yours blocks.

    gpipe   all forwards, then all backwards (arXiv 1811.06965)
    1f1b    p - rank in flight (arXiv 1806.03377); interleaved for v > 1 (arXiv 2104.04473): Megatron's order
    zb_h1   1f1b with W apart, put off `rank` times to fill gaps, in 1f1b's memory (arXiv 2401.10241: ZB-1P)
    zb_h2   twice in flight and no gaps (ZB-2P)
    zbv     two chunks, the second on the way back, no gaps in 1f1b's memory (torch's `ScheduleZBVZeroBubble`)

gpipe and 1f1b do W within B, and pass the gradient on after both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ropewalk.errors import UserError

SCHEDULES = ("gpipe", "1f1b", "zb_h1", "zb_h2", "zbv")
FUSED = ("gpipe", "1f1b")
"""those whose B includes W"""
F, B, W = 0, 1, 2

Times = float | Sequence[float]
"""seconds of one micro-batch on one stage: the same for all, or one for each stage in the model's order"""


class Work(NamedTuple):
    """One bar of a timeline; seconds from the step's start."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """One step. Chunks are activations of one micro-batch on one stage: 1/v of a rank's layers."""

    seconds: float
    """from the first start to the last end: what a step takes whose ranks wait for each other before the
    update, as clipping by the gradient's norm makes them"""
    span: float
    """the longest that a rank takes from its first start to its last end, by which the zero-bubble papers
    count: ranks that begin later may end later, if nothing makes them wait"""
    busy: tuple[float, ...]
    """seconds that each rank computes"""
    in_flight: tuple[int, ...]
    """the most chunks on each rank whose F is done and whose B is not"""
    held: tuple[int, ...]
    """the same until W is done: B frees but a part of a chunk where W comes later"""
    timeline: tuple[Work, ...] = ()

    @property
    def bubble(self) -> float:
        """Idle time over computing time (the papers' "fraction of ideal time"), of the busiest rank."""
        busiest = max(self.busy)
        return self.span / busiest - 1 if busiest else 0.0


def check(schedule: str, p: int, m: int, v: int, rank: int = 0) -> None:
    """UserError where there is no such schedule or rank."""
    if schedule not in SCHEDULES:
        raise UserError(f"{schedule}: no pipeline schedule; there is {', '.join(SCHEDULES)}")
    if p < 1 or m < 1 or v < 1 or p % 1 or m % 1 or v % 1:
        raise UserError(f"a pipeline has ranks, micro-batches and chunks, 1 or more; not {p}, {m} and {v}")
    if not 0 <= rank < p:
        raise UserError(f"a pipeline of {p} ranks has none of number {rank}")
    if v != 2 if schedule == "zbv" else v > 1 and schedule in ("gpipe", "zb_h2"):
        raise UserError(f"{schedule} has {2 if schedule == 'zbv' else 1} chunks per rank, not {v}")
    if v > 1 and schedule != "zbv" and m % p:
        raise UserError(
            f"an interleaved schedule needs a multiple of its {p} ranks in micro-batches; {m} is none"
        )


def rank_of(schedule: str, stage: int, p: int) -> int:
    """Where a stage is: dealt out in turns, or (zbv) there and back."""
    return 2 * p - 1 - stage if schedule == "zbv" and stage >= p else stage % p


def order(schedule: str, rank: int, p: int, m: int, v: int = 1) -> np.ndarray:
    """What a rank does, in order: rows of kind (F, B or W), stage, micro-batch."""
    check(schedule, p, m, v, rank)
    if schedule == "zbv":
        return _zbv(rank, p, m)
    count = m * v
    k = np.arange(count)
    # groups of p micro-batches through one chunk after the other; backwards through the last chunk first
    chunk, micro_batch = (k // p % v, k // (p * v) * p + k % p) if v > 1 else (0 * k, k)
    forward = np.stack([np.full(count, F), chunk * p + rank, micro_batch], axis=1)
    backward = np.stack([np.full(count, B), (v - 1 - chunk) * p + rank, micro_batch], axis=1)
    ahead, late = {
        "gpipe": (count, 0),
        "1f1b": ((v - 1) * p + (2 if v > 1 else 1) * (p - 1 - rank), 0),
        "zb_h1": ((v - 1) * p + (p - 1 - rank), rank),
        "zb_h2": (2 * (p - 1 - rank), 2 * rank),
    }[schedule]
    # `ahead` forwards, then in turns: a forward, a backward, and the weights' of `late` backwards ago
    rows, turn = [forward, backward], [3 * (k - min(ahead, count)), 3 * k + 1]
    if schedule not in FUSED:
        rows.append(np.concatenate([np.full((count, 1), W), backward[:, 1:]], axis=1))
        turn.append(3 * (k + late) + 2)
    return np.concatenate(rows)[np.argsort(np.concatenate(turn))]


def _zbv(rank: int, p: int, m: int) -> np.ndarray:
    """As torch has it. It is made for 2p - 1 micro-batches or more; of fewer, those beyond m are left out."""
    n = max(m, 2 * p - 1)
    rows = {
        (kind, chunk): np.stack(
            [np.full(n, kind), np.full(n, 2 * p - 1 - rank if chunk else rank), np.arange(n)], axis=1
        )
        for kind in (F, B, W)
        for chunk in (0, 1)
    }
    done = dict.fromkeys(rows, 0)
    parts = []

    def turns(times: int, *works: tuple[int, int]) -> None:
        """So many rounds of these, each with its next micro-batch."""
        taken = [rows[work][done[work] : done[work] + times] for work in works]
        parts.append(np.stack(taken, axis=1).reshape(-1, 3))
        for work in works:
            done[work] += times

    turns(2 * (p - rank) - 1, (F, 0))
    turns(rank, (F, 1), (F, 0))
    turns(p - rank, (F, 1), (B, 1), (W, 1))
    turns(n - done[F, 0], (F, 0), (B, 0), (W, 0), (F, 1), (B, 1), (W, 1))
    turns(n - done[F, 1], (B, 0), (W, 0), (F, 1), (B, 1), (W, 1))
    turns(rank, (B, 0), (B, 1))
    turns(p - rank, (B, 0), (W, 0))
    turns(n - done[W, 1], (W, 1))
    turns(n - done[W, 0], (W, 0))
    whole = np.concatenate(parts)
    return whole[whole[:, 2] < m]


def simulate(
    schedule: str,
    p: int,
    m: int,
    v: int = 1,
    forward: Times = 1.0,
    backward: Times = 1.0,
    weight: Times = 1.0,
    send: float = 0.0,
    timeline: bool = False,
) -> Simulated:
    """Run one step of m micro-batches. About 0.4 us for each F, B and W. UserError for what cannot be run."""
    check(schedule, p, m, v)
    stages = p * v
    seconds = np.array([_times(times, stages) for times in (forward, backward, weight)])
    if schedule in FUSED:
        seconds[B] += seconds[W]
    if not 0 <= send < math.inf:
        raise UserError(f"sending takes 0 seconds or more; not {send}")
    orders = [order(schedule, rank, p, m, v) for rank in range(p)]
    home = np.array([rank_of(schedule, stage, p) for stage in range(stages)])
    ends = _run(orders, seconds, home, m, send)
    last = [ends[rows[-1] @ (stages * m, m, 1)] for rows in orders]
    first = [ends[rank * m] - float(seconds[F, rank]) for rank in range(p)]
    return Simulated(
        seconds=max(last),
        span=max(end - start for start, end in zip(first, last, strict=True)),
        busy=tuple(float(seconds[rows[:, 0], rows[:, 1]].sum()) for rows in orders),
        in_flight=tuple(_most(rows, B) for rows in orders),
        held=tuple(_most(rows, B if schedule in FUSED else W) for rows in orders),
        timeline=tuple(_bars(orders, seconds, ends, m)) if timeline else (),
    )


def _times(times: Times, stages: int) -> np.ndarray:
    each = np.asarray(times, float)
    if each.ndim == 0:
        each = np.full(stages, each)
    if each.shape != (stages,) or not (np.isfinite(each).all() and (each >= 0).all()):
        raise UserError(f"a time of 0 seconds or more for all or for each of {stages} stages; not {times}")
    return each


def _run(orders: list[np.ndarray], seconds: np.ndarray, home: np.ndarray, m: int, send: float) -> list[float]:
    """When everything ends, by (kind, stage, micro-batch) in a flat list."""
    ends = [-1.0] * (3 * len(home) * m)
    asleep: dict[int, Iterator[int]] = {}
    awake: list[Iterator[int]] = []

    def work(rank: int) -> Iterator[int]:
        """One rank, until it lacks something: that is yielded, and whoever makes it wakes the rank."""
        now = 0.0
        for name, need, last in zip(*_needs(orders[rank], seconds, home, m), strict=True):
            if need >= 0:
                if ends[need] < 0:
                    yield need
                if ends[need] + send > now:
                    now = ends[need] + send
            ends[name] = now = now + last
            if name in asleep:
                awake.append(asleep.pop(name))

    awake.extend(work(rank) for rank in range(len(orders)))
    while awake:
        worker = awake.pop()
        lacks = next(worker, None)
        if lacks is not None:
            asleep[lacks] = worker
    assert not asleep, "an order in which ranks wait for each other"
    return ends


def _needs(
    rows: np.ndarray, seconds: np.ndarray, home: np.ndarray, m: int
) -> tuple[list[int], list[int], list[float]]:
    """Each work's name, the name of what it needs from another rank (or -1), and its seconds."""
    stages = len(home)
    kind, stage, micro_batch = rows.T
    before = np.where(kind == F, stage - 1, stage + 1)
    inside = (kind != W) & (before >= 0) & (before < stages)
    elsewhere = inside & (home[np.clip(before, 0, stages - 1)] != home[stage])
    name = (kind * stages + stage) * m + micro_batch
    need = np.where(elsewhere, (kind * stages + before) * m + micro_batch, -1)
    return name.tolist(), need.tolist(), seconds[kind, stage].tolist()


def _most(rows: np.ndarray, until: int) -> int:
    kind = rows[:, 0]
    return int(np.cumsum((kind == F).astype(int) - (kind == until)).max())


def _bars(orders: list[np.ndarray], seconds: np.ndarray, ends: list[float], m: int) -> list[Work]:
    bars = []
    for rank, rows in enumerate(orders):
        for kind, stage, micro_batch in rows.tolist():
            end = ends[(kind * seconds.shape[1] + stage) * m + micro_batch]
            start = end - float(seconds[kind, stage])
            bars.append(Work(rank, "FBW"[kind], stage, micro_batch, start, end))
    return bars


def step_seconds(
    schedule: str, p: int, m: int, v: int, forward: float, backward: float, weight: float, send: float = 0.0
) -> float:
    """`simulate(...).seconds` for equal stages: microseconds where a formula is known, else simulated.

    Known: gpipe; 1f1b, whose round trips of p micro-batches wait for 2(p-1) sends each; interleaved, while
    send <= the shorter of F and B + W (its slack hides all but the first and last); zb_h1 for W <= F and B,
    interleaved while send <= W/2; zb_h2 for W <= F and B, send <= W, m >= 2p - 1. Not zbv.
    """
    check(schedule, p, m, v)
    if not (forward >= 0 and backward >= 0 and weight >= 0 and 0 <= send < math.inf):
        raise UserError(f"times are 0 seconds or more; not {forward}, {backward}, {weight} and {send}")
    whole, filling = forward + backward + weight, (p - 1) * (forward + backward)
    hops, later = 2 * (p - 1) * send, m - 1
    if p == 1:
        return m * v * whole
    if schedule == "gpipe":
        return (m + p - 1) * whole + hops
    if schedule == "1f1b" and v == 1:
        return (m + p - 1) * whole + hops + 2 * send * (later - -(-later // p))
    if schedule == "1f1b" and send <= min(forward, backward + weight):
        return (m * v + p - 1) * whole + 2 * (p * v - 1) * send
    if weight <= min(forward, backward):
        if schedule == "zb_h1" and v == 1:
            return m * (forward + backward) + weight + filling + hops + _round_trips(p, later, weight, send)
        if schedule == "zb_h1" and 2 * send <= weight:
            sends = 4 * (p - 1) + (v - 1) * p - (2 if m == p else 0)
            return m * v * whole + filling - (p - 1) * weight + sends * send
        if schedule == "zb_h2" and send <= weight and m >= 2 * p - 1:
            return m * whole + max((p - 1) * (forward + send), filling - 2 * (p - 1) * weight + hops)
    return simulate(schedule, p, m, v, forward, backward, weight, send).seconds


def _round_trips(p: int, later: int, weight: float, send: float) -> float:
    """What zb_h1 waits for besides F and B from its first to its last backward: the longest of the ways that
    hop back and forth. A round trip over k ranks moves k micro-batches on, with 2(k-1) sends and one W."""
    if later < p:
        return 2 * send * max(0, later - 1)
    fewest, most = -(-later // p), later - p + 1
    return 2 * send * later + max((weight - 2 * send) * fewest, (weight - 2 * send) * most)


def chunks_held(schedule: str, rank: int, p: int, m: int, v: int = 1) -> int:
    """`simulate(...).held[rank]` at once; for zbv with fewer than 2p - 1 micro-batches no less than that.

    For interleaved 1f1b on rank 0 that is 1 + (p-1)/(pv) times all its layers (arXiv 2205.05198).
    """
    check(schedule, p, m, v, rank)
    most = {
        "gpipe": m,
        "1f1b": (v - 1) * p + (2 if v > 1 else 1) * (p - 1 - rank) + 1,
        "zb_h1": v * p,
        "zb_h2": 2 * p - 1,
        "zbv": 2 * p,
    }[schedule]
    return min(m * v, most)
