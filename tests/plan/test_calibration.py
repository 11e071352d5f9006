"""Rates are found again in the times that they make, and never beat the data sheet."""

import numpy as np
import pytest

from ropewalk.plan.calibration import features, fit_rates, least_costs, probes
from ropewalk.plan.hardware import accelerator


@pytest.fixture(scope="module")
def gpu_table() -> np.ndarray:
    table = np.array([features(work) for work in probes("cuda", "bfloat16")])
    table[:, 3] = 0.0
    return table


def test_rates_are_found_in_the_times_that_they_make(gpu_table: np.ndarray) -> None:
    least = least_costs(accelerator("h200"), "bfloat16")
    costs = least / (0.75, 0.8, 0.5, 1.0)
    found, error = fit_rates(gpu_table, gpu_table @ costs, least)
    assert found == pytest.approx(costs, rel=1e-6)
    assert error < 1e-9


def test_no_fit_is_faster_than_the_data_sheet(gpu_table: np.ndarray) -> None:
    """As when small passes wait for their launches, whatever they compute: seen on a GPU, where a fit without
    bounds had products at twice the peak and memory for nothing."""
    least = least_costs(accelerator("h200"), "bfloat16")
    seconds = np.maximum(gpu_table @ (least / (0.75, 0.8, 0.5, 1.0)), 0.02)
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
    costs = least_costs(accelerator("h200"), "bfloat16") / (0.75, 0.8, 0.5, 1.0)
    launches = np.array([features(work)[3] for work in probes("cuda", "bfloat16")])
    assert (gpu_table @ costs > 1.2 * 110e-6 * launches).all()
