"""What failures cost a run: how often they come, how often to save, what share of the time is useful.

Closed forms for failures that come at random (exponential gaps) and restarts that a further failure begins
anew; `simulate.py` plays the same run event by event, with what no formula holds: spares, repairs, ageing.

J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006.
Llama team, The Llama 3 herd of models, arXiv 2407.21783, section 3.3.4 and table 5.
"""

import math
from dataclasses import dataclass

from ropewalk.errors import UserError
from ropewalk.plan.inputs import at_least, positive, share, whole

DAY = 86_400.0

FAULTS_PER_DEVICE_DAY = 419 / (16_384 * 54)
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100, so one per device in 2,112 days."""
HARDWARE_SHARE = 0.78
"""Of those, confirmed or suspected faults of hardware: what takes a server out. The others only restart."""


@dataclass(frozen=True)
class Operation:
    """A run on `devices` and how it is kept alive. Times in seconds where no other unit is in the name.

    Any device's fault ends all of it (training is synchronous). It is noticed after `detect`, and `restart`
    later the run goes on from its newest whole checkpoint. UserError for impossible values.
    """

    devices: int
    faults_per_device_day: float = FAULTS_PER_DEVICE_DAY
    save: float = 60.0
    """from the beginning of a checkpoint until it counts"""
    stall: float | None = None
    """of that, what training waits; None: all of it (a synchronous save)"""
    interval: float | None = None
    """training between the end of one stall and the next save; None: the best"""
    detect: float = 60.0
    restart: float = 300.0
    weibull_shape: float = 1.0
    """of a device's life: 1 never ages, below 1 the young fail more, above 1 the old"""
    age_days: float = 0.0
    """how long the devices have run before; matters where they age"""
    hardware_share: float = HARDWARE_SHARE
    spares: int | None = None
    """servers that stand by and do not fail there; None: there is always one"""
    repair_hours: float = 24.0
    """mean time until a failed server stands by again (exponential)"""
    stragglers_per_device_day: float = 0.0
    slowdown: float = 1.3
    """a step's time with a straggler, over that without"""
    straggler_detect: float = 1_800.0
    """until a straggler is found; then the run saves, and restarts without it"""

    def __post_init__(self) -> None:
        whole(devices=self.devices)
        positive(faults_per_device_day=self.faults_per_device_day)
        if self.spares:
            whole(spares=self.spares)
        positive(weibull_shape=self.weibull_shape, repair_hours=self.repair_hours)
        at_least(0.0, save=self.save, detect=self.detect, restart=self.restart, age_days=self.age_days)
        at_least(0.0, stragglers_per_device_day=self.stragglers_per_device_day)
        at_least(0.0, straggler_detect=self.straggler_detect)
        at_least(1.0, slowdown=self.slowdown)
        if self.hardware_share:
            share(hardware_share=self.hardware_share)
        if self.stall is not None and not 0.0 <= self.stall <= self.save:
            raise UserError(f"stall is {self.stall:g}; it is a part of the save, 0 to {self.save:g} seconds")
        if self.interval is not None:
            positive(interval=self.interval)
            if self.interval < self.save - self.waits:
                beside = self.save - self.waits
                raise UserError(
                    f"interval is {self.interval:g} s; the save before is under way for {beside:g} s then"
                )

    @property
    def mtbf(self) -> float:
        """Seconds between failures of the whole run."""
        return mean_time_between_failures(self.devices, self.faults_per_device_day)

    @property
    def waits(self) -> float:
        """Seconds that training waits for one save."""
        return self.save if self.stall is None else self.stall

    @property
    def down(self) -> float:
        """Seconds from a fault until training goes on, if nothing else happens."""
        return self.detect + self.restart

    def cadence(self) -> float:
        """Seconds of training between saves: as given, or the best; at most one save is under way."""
        if self.interval is not None:
            return self.interval
        return max(daly_interval(self.waits, self.mtbf), self.save - self.waits, 1.0)


def mean_time_between_failures(devices: int, faults_per_device_day: float = FAULTS_PER_DEVICE_DAY) -> float:
    """Seconds between failures of a run that any of its devices can end."""
    positive(devices=devices, faults_per_device_day=faults_per_device_day)
    return DAY / (devices * faults_per_device_day)


def daly_interval(save: float, mtbf: float) -> float:
    """Seconds of training between saves that stop it for `save` each, so that least is lost (Daly, eq. 37).

    sqrt(2 save mtbf) (1 + x/3 + x^2/9) - save with x = sqrt(save / (2 mtbf)), and mtbf where the save takes
    twice that. Young's is the root alone. Within 0.1% in goodput of the exact optimum for save < mtbf / 2.
    """
    from ropewalk.train.cadence import young_interval  # the same root as of `checkpoint_minutes: auto`; torch

    at_least(0.0, save=save)
    positive(mtbf=mtbf)
    if save >= 2.0 * mtbf:
        return mtbf
    x = math.sqrt(save / (2.0 * mtbf))
    return young_interval(save, mtbf) * (1.0 + x / 3.0 + x * x / 9.0) - save


@dataclass(frozen=True)
class Expected:
    """Shares of a long run's time, which sum to 1: useful steps, waiting for saves, steps done twice, down.

    `slow` is what stragglers cost, with the restarts that leave them behind.
    """

    operation: Operation
    interval: float
    goodput: float
    saving: float
    redone: float
    down: float
    slow: float

    def lines(self) -> list[str]:
        run = self.operation
        rest = [(self.saving, "saving"), (self.redone, "done twice"), (self.down, "down")]
        rest += [(self.slow, "for stragglers")] if self.slow else []
        return [
            f"{run.devices:,} devices: a failure every {_hours(run.mtbf)}, "
            f"a checkpoint every {_hours(self.interval)}",
            f"goodput {self.goodput:.1%}; " + ", ".join(f"{value:.1%} {name}" for value, name in rest),
        ]


def expected(run: Operation) -> Expected:
    """The closed form. Failures as if no device aged, and always a spare; `simulate` knows better.

    With failures at rate 1/M a run lives M on average, and is down M (exp(R/M) - 1) with what fails in
    R = detect + restart again. The j-th checkpoint of a life counts j tau + (j-1) stall + save after its
    begin, so that tau exp(-(tau + save)/M) / (1 - exp(-(tau + stall)/M)) of it stay on average. For a
    synchronous save this is Daly's equation 13. Stragglers come in alternating times with and without one,
    taken as independent of the failures: first order, right to a tenth of what they cost.
    """
    interval, m = run.cadence(), run.mtbf
    up = math.exp(-run.down / m)
    kept = interval * math.exp(-(interval + run.save) / m) / -math.expm1(-(interval + run.waits) / m)
    useful = up * kept / m
    saving = useful * run.waits / interval
    even = _straggler_efficiency(run)
    return Expected(
        operation=run,
        interval=interval,
        goodput=useful * even,
        saving=saving * even,
        redone=max(0.0, up - useful - saving) * even,
        down=(1.0 - up) * even,
        slow=1.0 - even,
    )


def _straggler_efficiency(run: Operation) -> float:
    if not run.stragglers_per_device_day:
        return 1.0
    between = mean_time_between_failures(run.devices, run.stragglers_per_device_day)
    found = run.straggler_detect
    return (between + found / run.slowdown) / (between + found + run.save + run.restart)


def _hours(seconds: float) -> str:
    if seconds >= 2 * DAY:
        return f"{seconds / DAY:.1f} days"
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
