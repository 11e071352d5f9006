"""Rates are found again in the times that they make, and never beat the data sheet."""

import dataclasses
import importlib
import time
from typing import Any

import numpy as np
import pytest
import torch

from ropewalk.errors import UserError
from ropewalk.plan import Cluster, Work, calibrate
from ropewalk.plan.calibrate import updated_bytes
from ropewalk.plan.calibration import NEVER, _bare, features, fit_rates, least_costs, probes
from ropewalk.plan.hardware import accelerator
from ropewalk.plan.step_time import step_time


@pytest.fixture(scope="module")
def gpu_table() -> np.ndarray:
    table = np.array([features(work) for work in probes("cuda", "bfloat16")])
    table[:, 3] = 0.0
    return table


def test_rates_are_found_in_the_times_that_they_make(gpu_table: np.ndarray) -> None:
    least = least_costs(accelerator("h200"), "bfloat16")
    costs = least / (0.75, 0.8, 1.0, 1.0)
    costs[2] = costs[0] / 2  # attention takes half as long again
    found, error = fit_rates(gpu_table, gpu_table @ costs, least)
    assert found == pytest.approx(costs, rel=1e-6)
    assert error < 1e-9


def test_no_fit_is_faster_than_the_data_sheet(gpu_table: np.ndarray) -> None:
    """As when small passes wait for their launches, whatever they compute: seen on a GPU, where a fit without
    bounds had products at twice the peak and memory for nothing."""
    least = least_costs(accelerator("h200"), "bfloat16")
    seconds = np.maximum(gpu_table @ (least / (0.75, 0.8, 1.0, 1.0)), 0.02)
    found, _ = fit_rates(gpu_table, seconds, least)
    assert (found >= least).all()


def test_a_device_faster_than_its_data_sheet_is_taken_as_it_is(gpu_table: np.ndarray) -> None:
    """A kind that is not in the table has another's peaks."""
    least = least_costs(accelerator("a100"), "bfloat16")
    found, error = fit_rates(gpu_table, gpu_table @ (least / 3), least)
    assert found[:3] == pytest.approx(least[:3] / 3, rel=1e-6)
    assert error < 1e-9


def test_each_probe_on_a_gpu_computes_for_longer_than_it_launches(gpu_table: np.ndarray) -> None:
    """About 110 us of Python for a kernel that the model counts, on a fast host: forward and backward."""
    costs = least_costs(accelerator("h200"), "bfloat16") / (0.75, 0.8, 1.0, 1.0)
    launches = np.array([features(work)[3] for work in probes("cuda", "bfloat16")])
    assert (gpu_table @ costs > 1.2 * 110e-6 * launches).all()


def test_what_is_kept_is_asked_for_all_the_same() -> None:
    """Selective checkpointing calls every kernel of a block once more, those whose results it has kept too:
    where nothing but calls took time, as much as full checkpointing."""
    work = next(probes("cpu", "float32"))
    device = _bare("float32", NEVER, NEVER, NEVER, launch=1.0)
    again = {}
    for saver in ("selective", "full"):
        phases = step_time(dataclasses.replace(work, checkpointing=saver), Cluster(device, 1, 1)).phases
        again[saver] = phases["recomputation"]
    assert again["full"] > 0
    assert again["selective"] == pytest.approx(again["full"])


@pytest.mark.slow
def test_a_machine_is_measured_for_as_long_as_was_asked(monkeypatch: Any) -> None:
    """Each shape in turn, and again: neighbours of a virtual machine slow it down for seconds at a time, and
    what was fitted to the fastest of one turn was up to 50% off. The fastest of all turns is what counts."""
    module = importlib.import_module("ropewalk.plan.calibrate")
    shapes = list(probes("cpu", "float32"))
    turns: dict[Work, int] = {}

    def measured(work: Work, _: torch.device) -> tuple[float, float]:
        turns[work] = turns.get(work, 0) + 1
        time.sleep(0.001)
        disturbed = 2.0 if turns[work] == 1 else 1.0
        costs = 1 / 2e11, 1 / 1e10, 1 / 4e11, 1e-4
        return disturbed * float(np.dot(features(work), costs)), disturbed * updated_bytes(work) / 2e10

    monkeypatch.setattr(module, "measured_step", measured)
    rates = calibrate(torch.device("cpu"), patience=0.2).rates["float32"]
    assert min(turns[work] for work in shapes) >= 2
    assert rates.products == pytest.approx(2e11, rel=1e-3)
    assert rates.memory == pytest.approx(1e10, rel=1e-3)
    assert rates.attention == pytest.approx(1 / (1 / 2e11 + 1 / 4e11), rel=1e-3)
    assert rates.update == pytest.approx(2e10)
    assert rates.error < 1e-3


def test_a_device_on_which_nothing_fits_is_refused(monkeypatch: Any) -> None:
    module = importlib.import_module("ropewalk.plan.calibrate")

    def measured(work: Work, _: torch.device) -> tuple[float, float]:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module, "measured_step", measured)
    with pytest.raises(UserError, match="too little of its memory"):
        calibrate(torch.device("cpu"), patience=0.0)
