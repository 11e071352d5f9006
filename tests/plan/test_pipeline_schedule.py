"""The promise: every schedule respects what depends on what and loses no time; bubbles and memory are the
papers'; and the search's formulas equal the simulation wherever they claim to."""

import math
from time import process_time

import numpy as np
import pytest

from ropewalk.errors import UserError
from ropewalk.plan import pipeline_schedule as ps

EACH = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("1f1b", 2),
    ("1f1b", 3),
    ("zb_h1", 1),
    ("zb_h1", 2),
    ("zb_h2", 1),
    ("zbv", 2),
]


def unequal(p, v, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.uniform(0.5, 2, p * v).tolist() for name in ("forward", "backward", "weight")}


@pytest.mark.parametrize(("schedule", "v"), EACH)
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (3, 3), (4, 4), (4, 12), (5, 15)])
def test_everything_starts_as_soon_as_it_can_and_no_sooner(schedule, v, p, m):
    """Stages of unequal times: each work is done once, after what it needs, and its rank never dawdles."""
    send = 0.3
    run = ps.simulate(schedule, p, m, v, **unequal(p, v), send=send, timeline=True)
    done = {(work.kind, work.stage, work.micro_batch): work for work in run.timeline}
    kinds = "FB" if schedule in ps.FUSED else "FBW"
    assert len(done) == len(run.timeline) == len(kinds) * p * v * m
    free = dict.fromkeys(range(p), 0.0)
    for work in run.timeline:  # in each rank's order
        assert work.rank == ps.rank_of(schedule, work.stage, p)
        needs = {
            "F": [("F", work.stage - 1)],
            "B": [("B", work.stage + 1), ("F", work.stage)],
            "W": [("B", work.stage)],
        }[work.kind]
        before = [done[kind, stage, work.micro_batch] for kind, stage in needs if 0 <= stage < p * v]
        arrived = [other.end + (send if other.rank != work.rank else 0) for other in before]
        assert work.start == pytest.approx(max([free[work.rank], *arrived]))
        free[work.rank] = work.end
    assert run.seconds == max(work.end for work in run.timeline)
    assert sum(run.busy) == pytest.approx(sum(work.end - work.start for work in run.timeline))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 12), (8, 16), (8, 64)])
def test_published_bubbles(p, m):
    """Of ideal time, with F = B = W (arXiv 2104.04473, 2401.10241)."""
    published = {
        ("gpipe", 1): (p - 1) / m,
        ("1f1b", 1): (p - 1) / m,
        ("1f1b", 2): (p - 1) / (2 * m),
        ("1f1b", 4): (p - 1) / (4 * m),
        ("zb_h1", 1): (p - 1) / (3 * m),
        ("zb_h1", 2): (p - 1) / (6 * m),
        ("zb_h2", 1): 0,
        ("zbv", 2): 0,
    }
    for (schedule, v), bubble in published.items():
        run = ps.simulate(schedule, p, m, v)
        assert run.bubble == pytest.approx(bubble, abs=1e-12), schedule
        assert run.busy == (3 * m * v,) * p


def test_a_synchronised_update_pays_for_the_zero_bubble():
    """ZB-2P has no gaps, but ranks start one after another: where all wait for all, ZB-1P is as good."""
    p, m = 8, 32
    assert ps.simulate("zb_h2", p, m).seconds == ps.simulate("zb_h1", p, m).seconds == 3 * m + p - 1
    assert ps.simulate("zb_h2", p, m).span == 3 * m


@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 2), (4, 2), (4, 4), (4, 12), (8, 32)])
def test_chunks_in_flight(p, m):
    flight = {
        schedule: ps.simulate(schedule, p, m).in_flight for schedule in ("gpipe", "1f1b", "zb_h1", "zb_h2")
    }
    assert flight["gpipe"] == (m,) * p
    assert flight["1f1b"] == flight["zb_h1"] == tuple(min(m, p - rank) for rank in range(p))
    assert flight["zb_h2"] == tuple(min(m, 2 * (p - rank) - 1) for rank in range(p))


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 12, 3), (8, 64, 4)])
def test_interleaving_holds_more(p, m, v):
    """arXiv 2205.05198: 1 + (p-1)/(pv) times the L layers that 1f1b holds on rank 0; L for m = p."""
    first = ps.simulate("1f1b", p, m, v).in_flight[0]
    assert first / (p * v) == pytest.approx(1 + (p - 1) / (p * v))
    assert ps.simulate("1f1b", p, p, v).in_flight[0] == p * v


@pytest.mark.parametrize(("schedule", "v"), EACH)
def test_what_is_held_at_once(schedule, v):
    for p in (1, 2, 4, 7):
        for m in (1, 2, p, 2 * p, 5 * p):
            if v > 1 and schedule != "zbv" and m % p:
                continue
            held = ps.simulate(schedule, p, m, v).held
            known = tuple(ps.chunks_held(schedule, rank, p, m, v) for rank in range(p))
            if schedule == "zbv" and m < 2 * p - 1:
                assert all(a <= b for a, b in zip(held, known, strict=True))
            else:
                assert held == known


@pytest.mark.parametrize(("schedule", "v"), EACH)
def test_the_formula_is_the_simulation(schedule, v):
    """Any p, m, times and time to send: where no formula is known, it is the simulation itself."""
    random = np.random.default_rng(v)
    for _ in range(150):
        p = int(random.integers(1, 8))
        m = p * int(random.integers(1, 6)) if v > 1 else int(random.integers(1, 30))
        forward, backward = random.uniform(0.5, 1.5, 2)
        weight = random.choice([min(forward, backward), 1.5]) * random.uniform()
        send = random.choice([0, 0.1, 0.4, 1, 3]) * random.uniform()
        times = (forward, backward, weight, send)
        simulated = ps.simulate(schedule, p, m, v, *times).seconds
        assert ps.step_seconds(schedule, p, m, v, *times) == pytest.approx(simulated, rel=1e-9), (p, m, times)


def test_where_formulas_are_known(monkeypatch):
    """They answer without the simulation, for times as they are: W is no longer than F and B."""
    monkeypatch.setattr(ps, "simulate", None)
    for schedule, v, send in [
        ("gpipe", 1, 3),
        ("1f1b", 1, 3),
        ("zb_h1", 1, 3),
        ("1f1b", 4, 1),
        ("zb_h1", 2, 0.4),
    ]:
        assert ps.step_seconds(schedule, 8, 64, v, 1, 1.2, 0.9, send) > 64 * v * 3.1
    assert ps.step_seconds("zb_h2", 8, 64, 1, 1, 1.2, 0.9, 0.5) > 64 * 3.1
    begin = process_time()
    for _ in range(10_000):
        ps.step_seconds("zb_h1", 8, 64, 1, 1, 1.2, 0.9, 0.1)
    assert process_time() - begin < 1  # 2 us each on a quiet machine


def test_a_slow_stage_is_the_pace_of_all():
    """One stage of eight at half speed: every micro-batch waits for it."""
    times = [1.0] * 8
    times[3] = 2.0
    run = ps.simulate("1f1b", 8, 256, 1, times, times, times)
    assert run.seconds == pytest.approx(2 * 3 * 256, rel=0.05)
    assert run.bubble < 0.05


def test_large_ones_are_quick():
    begin = process_time()
    run = ps.simulate("1f1b", 64, 512, send=0.01)
    assert process_time() - begin < 0.5  # 0.05 on a quiet machine
    assert run.seconds > 3 * (512 + 63)


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: ps.simulate("2f2b", 4, 8),
        lambda: ps.simulate("1f1b", 0, 8),
        lambda: ps.simulate("1f1b", 4, 8.5),
        lambda: ps.simulate("1f1b", 4, 6, 2),
        lambda: ps.simulate("gpipe", 4, 8, 2),
        lambda: ps.simulate("zbv", 4, 8, 1),
        lambda: ps.simulate("1f1b", 4, 8, forward=-1),
        lambda: ps.simulate("1f1b", 4, 8, weight=math.nan),
        lambda: ps.simulate("1f1b", 4, 8, backward=[1, 2, 3]),
        lambda: ps.simulate("1f1b", 4, 8, send=-1),
        lambda: ps.step_seconds("1f1b", 4, 8, 1, 1, math.nan, 1),
        lambda: ps.chunks_held("zb_h2", 0, 4, 8, 2),
        lambda: ps.chunks_held("1f1b", 4, 4, 8),
        lambda: ps.order("zbv", -1, 4, 8, 2),
    ],
)
def test_nonsense_is_one_plain_message(nonsense):
    with pytest.raises(UserError) as failure:
        nonsense()
    assert "\n" not in str(failure.value)
