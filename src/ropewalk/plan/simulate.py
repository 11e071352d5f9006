"""A run of weeks on up to 100,000 devices, played fault by fault, and what a change of it buys.

Faults come at times of the clock that do not depend on how the run is operated, and the n-th of them always
breaks the same and is repaired in the same time. So two ways to operate meet the same bad luck, and the
difference is far less noisy than the two (common random numbers).
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from ropewalk.errors import UserError
from ropewalk.plan.failures import DAY, Operation, expected
from ropewalk.plan.inputs import one_of, positive

WINDOW = 10 * DAY
"""Faults are drawn for so long at once; part of what a seed means."""
HOPELESS = 50.0
"""A run that takes so many times its work is not played to its end."""
_TOO_OFTEN = (
    "failures come faster than the run gets over them; save and restart faster, keep more spares, or use "
    "fewer devices"
)


@dataclass(frozen=True)
class Played:
    """One trial: seconds in all and of each kind, and failures."""

    wall: float
    useful: float
    saving: float
    redone: float
    down: float
    no_spare: float
    slow: float
    failures: int


@dataclass(frozen=True)
class Simulated:
    """Means over trials; `..._error` is a standard error. Shares of the time, with goodput, sum to 1."""

    operation: Operation
    trials: int
    days: float
    days_error: float
    goodput: float
    goodput_error: float
    failures: float
    shares: dict[str, float]

    def lines(self) -> list[str]:
        rest = ", ".join(f"{value:.1%} {name}" for name, value in self.shares.items() if value >= 0.0005)
        return [
            f"{self.days:.2f} ± {self.days_error:.2f} days with {self.failures:,.0f} failures "
            f"({self.trials} trials)",
            f"goodput {self.goodput:.1%} ± {self.goodput_error:.1%}; {rest}",
        ]


@dataclass(frozen=True)
class Difference:
    """What a change buys: days saved and goodput gained, each with the standard error of the pairs' mean."""

    days: float
    days_error: float
    goodput: float
    goodput_error: float

    def __str__(self) -> str:
        return (
            f"{self.days:+.3f} ± {self.days_error:.3f} days saved, goodput {self.goodput:+.2%} "
            f"± {self.goodput_error:.2%}"
        )


def simulate(run: Operation, work_days: float, trials: int = 20, seed: int = 0) -> Simulated:
    """Plays a run that would take `work_days` if nothing ever failed or was saved, `trials` times.

    UserError where it would not end in any reasonable time.
    """
    played = _trials(run, work_days, trials, seed)
    days, wall = _days(played), sum(one.wall for one in played)
    named = {"saving": "saving", "redone": "done twice", "down": "down", "no_spare": "without a spare"}
    named["slow"] = "behind stragglers"
    return Simulated(
        operation=run,
        trials=trials,
        days=float(days.mean()),
        days_error=_error(days),
        goodput=sum(one.useful for one in played) / wall,
        goodput_error=_error(_goodputs(played)),
        failures=sum(one.failures for one in played) / trials,
        shares={name: sum(getattr(one, key) for one in played) / wall for key, name in named.items()},
    )


def what_if(run: Operation, work_days: float, trials: int = 20, seed: int = 0, **changes: Any) -> Difference:
    """What `changes` of fields would buy: `what_if(run, 60, restart=run.restart - 10)`.

    UserError for a field that there is not.
    """
    known = {field.name: field.name for field in fields(Operation)}
    other = replace(run, **{one_of("property of a run", name, known): changes[name] for name in changes})
    before, after = (_trials(each, work_days, trials, seed) for each in (run, other))
    days, goodput = _days(before) - _days(after), _goodputs(after) - _goodputs(before)
    return Difference(float(days.mean()), _error(days), float(goodput.mean()), _error(goodput))


def _trials(run: Operation, work_days: float, trials: int, seed: int) -> list[Played]:
    positive(work_days=work_days)
    if trials < 2:
        raise UserError(f"trials is {trials}; the noise is unknown with fewer than 2")
    if run.weibull_shape == 1 and expected(run).goodput * HOPELESS < 1:  # millions of faults, for nothing
        raise UserError(f"the work would take more than {HOPELESS:.0f} times its length: {_TOO_OFTEN}")
    return [play(run, work_days * DAY, child) for child in np.random.SeedSequence(seed).spawn(trials)]


def _days(played: list[Played]) -> np.ndarray:
    return np.array([one.wall / DAY for one in played])


def _goodputs(played: list[Played]) -> np.ndarray:
    return np.array([one.useful / one.wall for one in played])


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def fault_times(run: Operation, rng: np.random.Generator) -> Iterator[float]:
    """Seconds at which a device fails, in order, without end; a failed one is replaced by a new one.

    Each device's life is Weibull with the mean that the rate says; the first ones have lived `age_days`.
    """
    shape = run.weibull_shape
    scale = DAY / run.faults_per_device_day / math.gamma(1.0 + 1.0 / shape)
    # what is left of a Weibull life after an age a: ((a/s)^k + Exp(1))^(1/k) s - a
    age = run.age_days * DAY
    due = ((age / scale) ** shape + rng.exponential(size=run.devices)) ** (1.0 / shape) * scale - age
    end = WINDOW
    while True:
        found, failing = [], np.flatnonzero(due < end)
        while failing.size:
            found.append(due[failing])
            due[failing] += scale * rng.exponential(size=failing.size) ** (1.0 / shape)
            failing = failing[due[failing] < end]
        if found:
            yield from np.sort(np.concatenate(found)).tolist()
        end += WINDOW


def _arrivals(rate: float, rng: np.random.Generator) -> Iterator[float]:
    now = 0.0
    while True:
        now += rng.exponential() / rate if rate else math.inf
        yield now


class _Spares:
    """Servers that stand by; a broken one comes back when it is repaired."""

    def __init__(self, run: Operation, rng: np.random.Generator) -> None:
        self.run, self.rng, self.free = run, rng, run.spares
        self.back: list[float] = []

    def available(self, noticed: float) -> float:
        """When the run has all its servers again after a fault that is noticed then."""
        broken, repair = self.rng.random() < self.run.hardware_share, self.rng.exponential()
        if not broken or self.free is None:
            return noticed
        heapq.heappush(self.back, noticed + repair * self.run.repair_hours * 3_600.0)
        while self.back and self.back[0] <= noticed:
            heapq.heappop(self.back)
            self.free += 1
        if self.free:
            self.free -= 1
            return noticed
        return heapq.heappop(self.back)


@dataclass
class _Life:
    """Training from one start to the next end; times since its start. `slow_from`: a straggler's arrival."""

    interval: float
    waits: float
    slowdown: float
    slow_from: float

    def trained(self, elapsed: float) -> float:
        """Seconds of `elapsed` that were not spent in stalls."""
        periods, rest = divmod(elapsed, self.interval + self.waits)
        return periods * self.interval + min(rest, self.interval)

    def work(self, trained: float) -> float:
        """What so many seconds of training do, in seconds at full speed."""
        even = self.trained(self.slow_from) if math.isfinite(self.slow_from) else math.inf
        return trained if trained <= even else even + (trained - even) / self.slowdown

    def until(self, work: float) -> float:
        """When that much work is done."""
        even = self.trained(self.slow_from) if math.isfinite(self.slow_from) else math.inf
        trained = work if work <= even else even + (work - even) * self.slowdown
        return trained + self.waits * max(0, math.ceil(trained / self.interval) - 1)

    def saved(self, elapsed: float, save: float) -> int:
        """Checkpoints that count by then: the j-th does at j (interval + waits) - waits + save."""
        return max(0, math.floor((elapsed + self.waits - save) / (self.interval + self.waits)))


class _Times:
    """Times in order, the `next` of which can be looked at."""

    def __init__(self, times: Iterator[float]) -> None:
        self._times, self.next = times, next(times)

    def pop(self) -> float:
        value, self.next = self.next, next(self._times)
        return value

    def pass_by(self, now: float) -> bool:
        """Drops those up to now; whether there was one."""
        before = self.next
        while self.next <= now:
            self.pop()
        return before <= now


def _recover(run: Operation, faults: _Times, spares: _Spares, patience: float) -> tuple[float, float, int]:
    """From the next fault until training goes on: when, seconds without a spare, faults.

    A fault before that begins the recovery anew, which after the time `patience` nobody waits for.
    """
    available, without, count = 0.0, 0.0, 0
    while True:
        noticed = faults.pop() + run.detect
        available, count = max(available, spares.available(noticed)), count + 1
        without += max(0.0, min(available, faults.next) - noticed)
        ready = max(available, noticed) + run.restart
        if faults.next >= ready or ready > patience:
            return ready, without, count


def _end(
    life: _Life, run: Operation, left: float, found: float, fault: float
) -> tuple[Literal["complete", "orderly", "failed"], float, float, float]:
    """The end of a life with `left` work to do, whose straggler is found and which fails after so long.

    Gives how it ends, its seconds, those of training that count, and those that went into saves.
    """
    finish = life.until(left)
    if finish <= min(found, fault):
        kept = life.trained(finish)
        return "complete", finish, kept, finish - kept
    if found + run.save <= fault:  # saved once more, to go on without the straggler
        elapsed, kept = found + run.save, life.trained(found)
        return "orderly", elapsed, kept, elapsed - kept
    saves = life.saved(min(fault, found), run.save)
    return "failed", fault, saves * life.interval, saves * life.waits


def play(run: Operation, work: float, seed: np.random.SeedSequence) -> Played:
    """One trial of `work` seconds of training."""
    for_faults, for_repairs, for_stragglers = (np.random.default_rng(s) for s in seed.spawn(3))
    faults, spares = _Times(fault_times(run, for_faults)), _Spares(run, for_repairs)
    rate = run.devices * run.stragglers_per_device_day / DAY
    stragglers = _Times(_arrivals(rate, for_stragglers))
    interval, patience = run.cadence(), HOPELESS * work
    now = done = saving = redone = down = no_spare = slow = 0.0
    failures, limping, unnoticed = 0, False, run.straggler_detect
    while now <= patience:
        limping |= stragglers.pass_by(now)  # it came while the run was down
        slow_from = 0.0 if limping else stragglers.next - now
        found = slow_from + unnoticed
        life = _Life(interval, run.waits, run.slowdown, slow_from)
        how, elapsed, kept, saved = _end(life, run, work - done, found, faults.next - now)
        useful = life.work(kept)
        done, slow, now = done + useful, slow + kept - useful, now + elapsed
        saving, redone = saving + saved, redone + (elapsed - kept - saved)
        if how == "complete":
            return Played(now, done, saving, redone, down, no_spare, slow, failures)
        limping = how == "failed" and slow_from < elapsed
        unnoticed = max(0.0, found - elapsed) if limping else run.straggler_detect
        stragglers.pass_by(now)  # one is as slow as several, and all are left behind together
        ready, without, count = now + run.restart, 0.0, 0
        if how == "failed" or faults.next < ready:
            ready, without, count = _recover(run, faults, spares, patience)
        no_spare, down = no_spare + without, down + ready - now - without
        failures, now = failures + count, ready
    raise UserError(
        f"{done / work:.0%} of the work is done after {HOPELESS:.0f} times its length: {_TOO_OFTEN}"
    )
