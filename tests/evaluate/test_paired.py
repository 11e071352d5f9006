"""Paired differences: the t distribution against its density, and what the interval promises."""

import math

import numpy as np
import pytest

from ropewalk.evaluate.paired import CONFIDENCE, Paired, number, t_quantile, t_within


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 30])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 8.0])
def test_the_probability_is_the_integral_of_students_density(degrees, t):
    x = np.linspace(-t, t, 200_001)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert t_within(t, degrees) == pytest.approx(np.trapezoid(density, x), abs=1e-8)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_the_quantiles_are_those_of_every_table(degrees, expected):
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_variants_are_told_apart_as_seldom_as_promised(seeds):
    """4,000 experiments in which there is nothing to find, with seeds that matter far more than it would."""
    random = np.random.default_rng(0)
    of_seed = random.normal(0, 10, (4000, seeds, 1))
    values = of_seed + random.normal(3, 0.1, (4000, seeds, 2))
    found = [Paired("loss", tuple(v[:, 0]), tuple(v[:, 1])) for v in values]
    wrong = np.mean([one.differs for one in found])
    assert wrong == pytest.approx(1 - CONFIDENCE, abs=4 * math.sqrt(0.05 * 0.95 / 4000))
    assert all((one.p_value < 1 - CONFIDENCE) == one.differs for one in found)


def test_a_difference_beside_the_noise_is_found_and_has_its_direction():
    before, after = (3.1, 2.9, 3.0), (3.31, 3.12, 3.20)
    loss = Paired("loss", before, after)
    assert loss.better is False
    assert Paired("score", before, after, smaller_is_better=False).better is True
    assert loss.mean == pytest.approx(0.21)
    assert loss.error == pytest.approx(np.std(loss.differences, ddof=1) / math.sqrt(3))
    assert loss.numbers() == "+0.21 +- 0.025"


def test_no_noise_at_all():
    same = Paired("loss", (1.0, 2.0), (1.0, 2.0))
    assert (same.differs, same.better, same.p_value) == (False, None, 1.0)
    shifted = Paired("loss", (1.0, 2.0), (1.5, 2.5))
    assert (shifted.differs, shifted.better, shifted.p_value) == (True, False, 0.0)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="two seeds"):
        Paired("loss", (1.0,), (2.0,))


def test_numbers_are_words_up_to_ten():
    assert [number(n) for n in (2, 10, 11)] == ["two", "ten", "11"]
