"""What failures cost: published figures, the closed form, and the simulation against it and by itself."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from ropewalk.errors import UserError
from ropewalk.plan import simulate as simulation
from ropewalk.plan.failures import DAY, Operation, daly_interval, expected, mean_time_between_failures
from ropewalk.plan.simulate import fault_times, simulate, what_if
from ropewalk.train.cadence import young_interval

LLAMA = Operation(devices=16_384, save=10, detect=60, restart=420)
"""Assumed where the paper is silent: training waits 10 s for a save, and a failure costs 8 minutes."""


def within(value: float, target: float, error: float) -> bool:
    """Three standard errors; the seeds are fixed, so that a test that passes once does always."""
    return abs(value - target) < 3 * error


def test_the_mean_time_between_failures_of_llama_3():
    """419 interruptions in 54 days: one in 3.09 hours; as the devices grow it falls in proportion."""
    assert mean_time_between_failures(16_384) == pytest.approx(54 * DAY / 419)
    assert mean_time_between_failures(16_384) / 3600 == pytest.approx(3.09, abs=0.005)
    assert mean_time_between_failures(100_000) / 60 == pytest.approx(30.4, abs=0.1)
    assert mean_time_between_failures(1) == pytest.approx(2_112 * DAY, rel=1e-3)


@pytest.mark.parametrize(
    ("save", "interval", "lost"), [(10, 472, 0.042), (30, 817, 0.073), (60, 1156, 0.104)]
)
def test_youngs_figures_and_dalys_beside_them(save, interval, lost):
    """M = 3.09 h. Young's interval and first-order loss, and that the exact form agrees to first order."""
    mtbf = 3.09 * 3600
    young = young_interval(save, mtbf)
    assert young == pytest.approx(interval, abs=1)
    assert save / young + young / (2 * mtbf) == pytest.approx(lost, abs=0.0006)
    assert daly_interval(save, mtbf) == pytest.approx(young, abs=save)
    run = Operation(1, DAY / mtbf, save=save, interval=young, detect=0, restart=0)
    assert 1 - expected(run).goodput == pytest.approx(lost, rel=0.04)


@pytest.mark.parametrize("save", [1, 10, 100, 1000, 5000])
def test_dalys_interval_is_the_best_of_the_closed_form(save):
    mtbf = 10_000.0
    run = Operation(1, DAY / mtbf, save=save)
    best = max(expected(replace(run, interval=t)).goodput for t in np.geomspace(10, 20_000, 2_000))
    assert expected(run).goodput == pytest.approx(best, rel=1e-3)
    assert expected(run).goodput <= best * (1 + 1e-6)


def test_a_save_longer_than_twice_the_time_between_failures_is_made_once_in_that_time():
    assert daly_interval(100, 40) == 40


@pytest.mark.parametrize(
    "run",
    [
        LLAMA,
        Operation(16_384, save=60, stall=5, interval=300),
        Operation(100_000, save=30, stall=0, detect=30, restart=120),
        Operation(200_000, save=120, detect=60, restart=300),  # where less than half of the time is useful
    ],
    ids=["synchronous", "asynchronous", "never waiting", "hard pressed"],
)
def test_the_simulation_equals_the_closed_form(run):
    form, played = expected(run), simulate(run, 15, trials=20, seed=1)
    assert played.goodput_error < 0.003
    assert within(played.goodput, form.goodput, played.goodput_error)
    assert played.shares["saving"] == pytest.approx(form.saving, abs=0.002)
    assert played.shares["done twice"] == pytest.approx(form.redone, abs=0.004)
    assert played.shares["down"] == pytest.approx(form.down, abs=0.006)
    assert sum(played.shares.values()) + played.goodput == pytest.approx(1)
    total = form.goodput + form.saving + form.redone + form.down + form.slow
    assert total == pytest.approx(1)
    assert played.days == pytest.approx(15 / played.goodput, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "faults", "stragglers", "expected_seconds"),
    [
        # 100 trained, 10 saved, 100, 10, 100
        ({}, [], [], {"wall": 320, "saving": 20}),
        # at 120 a straggler, found at 170 after 25 s worth of work; saved by 180, gone by 200
        ({}, [], [120], {"wall": 375, "saving": 30, "slow": 25, "down": 20}),
        # the first checkpoint is whole at 110; down to 175, the straggler still there and found at 195
        ({}, [150], [120], {"wall": 425, "saving": 30, "slow": 10, "down": 45, "redone": 40}),
        # a fault in the straggler's last save loses it; after the restart it is found at once
        ({}, [175], [120], {"wall": 440, "saving": 30, "down": 45, "redone": 65, "slow": 0}),
        # a straggler that comes while the run is down slows it from the start
        ({}, [50], [60], {"wall": 450, "redone": 50, "down": 45, "slow": 25, "saving": 30}),
        # two faults within one recovery, and one an instant after another
        ({}, [50, 60, 60.5], [], {"wall": 85.5 + 320, "down": 35.5, "redone": 50, "saving": 20}),
        # an asynchronous save that began at 100 counts from 160 on
        ({"save": 60, "stall": 10}, [159], [], {"wall": 184 + 320, "redone": 159, "down": 25, "saving": 20}),
        ({"save": 60, "stall": 10}, [161], [], {"wall": 186 + 210, "redone": 51, "down": 25, "saving": 20}),
    ],
)
def test_a_short_run_is_played_as_the_hand_does(monkeypatch, changes, faults, stragglers, expected_seconds):
    """300 s of work; saves after 100 s take 10; 5 s to notice a fault and 20 to restart."""
    run = Operation(8, save=10, interval=100, detect=5, restart=20, slowdown=2, straggler_detect=50)
    never = [math.inf] * 3
    monkeypatch.setattr(simulation, "fault_times", lambda *_: iter([*map(float, faults), *never]))
    monkeypatch.setattr(simulation, "_arrivals", lambda *_: iter([*map(float, stragglers), *never]))
    played = simulation.play(replace(run, **changes), 300.0, np.random.SeedSequence(0))
    zero = dict.fromkeys(("saving", "redone", "down", "no_spare", "slow"), 0.0)
    found = {name: getattr(played, name) for name in (*zero, "wall")}
    assert found == pytest.approx(zero | expected_seconds)
    assert played.failures == len(faults)
    assert played.wall == pytest.approx(played.useful + sum(found.values()) - played.wall)


def test_a_run_that_restarts_at_once_comes_to_its_end():
    """Nothing is lost but the steps since the last save, a second each at most."""
    played = simulate(Operation(16_384, save=0, detect=0, restart=0), 5, trials=2)
    assert played.failures > 20
    assert 1 - 2e-4 < played.goodput < 1
    assert played.shares["down"] == 0


def test_stragglers_cost_what_the_first_order_says():
    """To a tenth of it: the formula leaves out that stragglers also come while the run is down."""
    run = replace(LLAMA, stragglers_per_device_day=2e-4, slowdown=1.5)
    form, played = expected(run), simulate(run, 30, trials=20, seed=2)
    price = expected(LLAMA).goodput - form.goodput
    assert price > 0.03
    assert abs(form.goodput - played.goodput) < price / 10 + 3 * played.goodput_error
    assert played.shares["behind stragglers"] > 0.02
    assert sum(played.shares.values()) + played.goodput == pytest.approx(1)


def test_llama_3_was_effective_for_more_than_90_percent():
    """With the assumptions above, and 47 planned interruptions of as long; not if each took twice that."""
    planned = 47 * LLAMA.down / (54 * DAY)
    assert expected(LLAMA).goodput - planned > 0.90
    played = simulate(LLAMA, 54 * 0.91, trials=20)
    assert played.goodput - planned > 0.90
    assert played.days == pytest.approx(54, abs=0.7)
    assert played.failures == pytest.approx(419, abs=20)
    slower = replace(LLAMA, restart=900)
    assert expected(slower).goodput - 47 * slower.down / (54 * DAY) < 0.90


def test_what_a_faster_restart_buys():
    """The noise of pairs is a twelfth of that of two separate answers; the gain is the closed form's."""
    bought = what_if(LLAMA, 60, trials=20, restart=LLAMA.restart - 10)
    faster = replace(LLAMA, restart=LLAMA.restart - 10)
    assert within(bought.goodput, expected(faster).goodput - expected(LLAMA).goodput, bought.goodput_error)
    assert bought.days == pytest.approx(bought.goodput * 65.4 / expected(LLAMA).goodput, rel=0.02)
    assert bought.days_error < math.sqrt(2) * simulate(LLAMA, 60, trials=20).days_error / 12
    assert "days saved" in str(bought)
    nothing = what_if(LLAMA, 60, restart=LLAMA.restart)
    assert (nothing.days, nothing.goodput) == (0, 0)


@pytest.mark.parametrize(
    "worse",
    [
        {"devices": 32_768},
        {"faults_per_device_day": 1e-3},
        {"save": 60.0},
        {"detect": 300.0},
        {"restart": 900.0},
        {"stragglers_per_device_day": 1e-4},
        {"interval": 60.0},
        {"interval": 5000.0},
        {"spares": 8},
    ],
)
def test_what_is_worse_in_one_thing_takes_longer(worse):
    bought = what_if(LLAMA, 20, trials=10, seed=3, **worse)
    assert bought.days < -3 * bought.days_error < 0
    if "spares" not in worse:
        assert expected(replace(LLAMA, **worse)).goodput < expected(LLAMA).goodput


def test_enough_spares_are_as_good_as_any_number():
    """With the 99% quantile of Palm's Poisson number of servers in repair, and one more, a server lacks
    seldom; with a third of that the run waits for repairs."""
    mean = LLAMA.hardware_share * 24 * 3600 / LLAMA.mtbf
    enough = math.ceil(mean + 2.33 * math.sqrt(mean)) + 1
    assert simulate(replace(LLAMA, spares=enough), 30).shares["without a spare"] < 0.005
    assert simulate(replace(LLAMA, spares=enough // 3), 10).shares["without a spare"] > 0.3


@pytest.mark.parametrize(("shape", "age_days"), [(1.0, 0.0), (0.7, 0.0), (0.7, 400.0), (2.0, 400.0)])
def test_as_many_devices_fail_as_their_weibull_says(shape, age_days):
    """The cumulative hazard of the first lives, (age + t)^k - age^k; replacements are few here."""
    run = Operation(50_000, weibull_shape=shape, age_days=age_days)
    count = 0
    for moment in fault_times(run, np.random.default_rng(5)):
        if moment > 30 * DAY:
            break
        count += 1
    scale = 1 / run.faults_per_device_day / math.gamma(1 + 1 / shape)
    hazard = ((age_days + 30) / scale) ** shape - (age_days / scale) ** shape
    assert count == pytest.approx(run.devices * hazard, abs=4 * math.sqrt(run.devices * hazard) + 30)


def test_fault_times_are_in_order_and_the_mean_gap_is_right():
    run, rng = Operation(100, faults_per_device_day=0.5), np.random.default_rng(0)
    times = [t for t, _ in zip(fault_times(run, rng), range(20_000), strict=False)]
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(run.mtbf, rel=0.02)
    assert gaps.std() == pytest.approx(run.mtbf, rel=0.03)  # exponential


def test_the_same_seed_is_the_same_answer_and_100_000_devices_take_no_time():
    run = Operation(100_000, save=30, stall=2, detect=30, restart=120, spares=60)
    began = time.process_time()
    first = simulate(run, 60, trials=2, seed=7)
    assert time.process_time() - began < 2 * 2
    assert simulate(run, 60, trials=2, seed=7) == first
    assert simulate(run, 60, trials=2, seed=8) != first
    assert first.failures > 3_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Operation(0), "devices is 0"),
        (lambda: Operation(8.5), "devices is 8.5; it must be a whole number"),
        (lambda: Operation(8, spares=-2), "spares is -2"),
        (lambda: Operation(8, save=-1), "save is -1"),
        (lambda: Operation(8, save=10, stall=20), "stall is 20; it is a part of the save"),
        (lambda: Operation(8, save=60, stall=5, interval=20), "under way for 55 s"),
        (lambda: Operation(8, slowdown=0.5), "slowdown is 0.5; it must be 1 or more"),
        (lambda: Operation(8, hardware_share=1.5), "hardware_share is 1.5"),
        (lambda: Operation(8, detect=math.nan), "detect is nan"),
        (lambda: simulate(LLAMA, 0), "work_days is 0"),
        (lambda: simulate(LLAMA, 1, trials=1), "trials is 1"),
        (lambda: what_if(LLAMA, 1, restrat=3.0), "did you mean restart"),
        (lambda: simulate(replace(LLAMA, restart=1e6), 1, trials=2), "failures come faster"),
        (lambda: simulate(replace(LLAMA, devices=100_000_000), 60), "failures come faster"),
        (lambda: simulate(replace(LLAMA, spares=0, repair_hours=9e4), 1, trials=2), "% of the work is done"),
    ],
)
def test_mistakes_get_one_message(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_answers_are_said_in_two_lines():
    assert "a failure every 3.09 h" in expected(LLAMA).lines()[0]
    assert "goodput 9" in expected(LLAMA).lines()[1]
    assert len(simulate(LLAMA, 5, trials=2).lines()) == 2
