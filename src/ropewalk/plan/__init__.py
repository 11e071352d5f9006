"""The plan room: what a run will take in memory, time and money, before it is started; and which layout is
best.

In: a recipe, or a model's sizes and a Layout; a cluster. Out: estimates, term by term. Below `entry` and
`here` it is arithmetic on plain values. May import: model, adapt, ops, parallel, data, train; recipe and
track in entry and here.
"""

from ropewalk import make_callable
from ropewalk.plan.calibrate import calibrate
from ropewalk.plan.calibration import Calibration, calibration
from ropewalk.plan.entry import (
    PLAN,
    Outcome,
    Plan,
    accuracy,
    as_json,
    estimate_json,
    foreseen,
    learn,
    outcomes,
    plan,
    propose,
)
from ropewalk.plan.estimates import Estimate, estimate
from ropewalk.plan.hardware import Cluster, accelerators, cluster
from ropewalk.plan.here import here
from ropewalk.plan.search import search
from ropewalk.plan.work import Work, work_of

__all__ = [
    "PLAN",
    "Calibration",
    "Cluster",
    "Estimate",
    "Outcome",
    "Plan",
    "Work",
    "accelerators",
    "accuracy",
    "as_json",
    "calibrate",
    "calibration",
    "cluster",
    "estimate",
    "estimate_json",
    "foreseen",
    "here",
    "learn",
    "outcomes",
    "plan",
    "propose",
    "search",
    "work_of",
]

make_callable(__name__)
