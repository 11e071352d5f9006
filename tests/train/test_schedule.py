"""schedule: the learning rate in closed form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.train.schedule import learning_rate

NAMES = ("cosine", "linear", "constant", "warmup_stable_decay")


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_a_straight_line_to_the_peak(name) -> None:
    rates = [learning_rate(step, 100, peak=2.0, name=name, warmup=10) for step in range(1, 11)]
    assert rates == pytest.approx([0.2 * step for step in range(1, 11)])


def test_cosine_is_half_way_in_the_middle() -> None:
    rate = [learning_rate(step, 110, peak=1.0, name="cosine", warmup=10, minimum=0.2) for step in range(111)]
    assert rate[60] == pytest.approx(0.6)
    assert rate[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate[110] == pytest.approx(0.2)


def test_linear_falls_by_the_same_amount() -> None:
    rate = [learning_rate(step, 20, peak=1.0, name="linear", warmup=0, minimum=0.0) for step in range(1, 21)]
    assert rate == pytest.approx([1 - step / 20 for step in range(1, 21)])


def test_constant_stays() -> None:
    assert {learning_rate(step, 9, peak=0.3, name="constant") for step in range(1, 10)} == {0.3}


def test_warmup_stable_decay_has_three_parts() -> None:
    shape = {"peak": 1.0, "name": "warmup_stable_decay", "warmup": 10, "decay_fraction": 0.2, "minimum": 0.0}
    rate = [learning_rate(step, 100, **shape) for step in range(101)]
    assert set(rate[10:81]) == {1.0}
    assert rate[81:] == pytest.approx([1 - k / 20 for k in range(1, 21)])


@given(
    total=st.integers(1, 500),
    share=st.floats(0, 1),
    name=st.sampled_from(NAMES),
    minimum=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_every_rate_lies_between_zero_and_the_peak_and_falls_after_warm_up(
    total, share, name, minimum, decay
) -> None:
    warmup = round(share * total)
    shape = {"peak": 1.0, "name": name, "warmup": warmup, "decay_fraction": decay, "minimum": minimum}
    rate = [learning_rate(step, total, **shape) for step in range(1, total + 1)]
    assert all(0.0 <= r <= 1.0 + 1e-12 for r in rate)
    assert all(b <= a + 1e-12 for a, b in zip(rate[warmup:], rate[warmup + 1 :], strict=False))
    if name in ("cosine", "linear") and warmup < total:
        assert rate[-1] == pytest.approx(minimum)
