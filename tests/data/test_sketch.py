"""Summaries in bounded memory: exact where they say so, else within their bounds, however data is cut."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.look.sketch import EXACT, Frequent, Quantiles

PIECES = [np.s_[:1], np.s_[1:700], np.s_[700:]]


def summed(values, pieces=PIECES):
    total = Quantiles()
    for piece in pieces:
        part = Quantiles()
        part.add(values[piece])
        total.merge(Quantiles.load(part.dump()))
    return total


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).lognormal(3, 2, 5000),
        -np.random.default_rng(1).lognormal(0, 1, 5000),
        np.random.default_rng(2).integers(0, 100_000, 5000),
        np.round(np.random.default_rng(3).normal(0, 50, 5000)),
        np.zeros(5000),
    ],
)
def test_quantiles_are_within_one_percent_and_exact_for_few_values(values):
    found = summed(values)
    assert (found.values is not None) == (len(np.unique(values)) <= EXACT)
    for share in (0.0, 0.05, 0.5, 0.9, 1.0):
        exact = np.quantile(values, share, method="inverted_cdf")
        if found.values is not None:
            assert found.quantile(share) == exact
        else:
            assert found.quantile(share) == pytest.approx(exact, rel=0.0101, abs=0.5 * found.whole)
    assert (found.min, found.max, found.count) == (values.min(), values.max(), len(values))
    assert found.sum == pytest.approx(values.sum())


@given(st.lists(st.integers(-3, 3) | st.floats(-1e6, 1e6), max_size=60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_quantiles_do_not_depend_on_how_values_are_divided(values, cut):
    array = np.array(values, float)
    assert (
        summed(array, [np.s_[:cut], np.s_[cut:]]).dump()["values"]
        == summed(array, [np.s_[:]]).dump()["values"]
    )


def test_a_histogram_has_every_value_once():
    values = np.random.default_rng(4).lognormal(3, 2, 3000)
    edges = np.geomspace(1, 500, 21)
    found = summed(values).histogram(edges)
    exact = np.histogram(np.clip(values, 1, 499.9), edges)[0]
    assert sum(found) == len(values)
    assert np.abs(np.cumsum(found) - np.cumsum(exact)).max() <= 0.02 * len(values)


def test_unknown_values_are_counted_apart():
    found = Quantiles()
    found.add(np.array([1.0, np.nan, 3.0]))
    assert (found.count, found.unknown, found.quantile(0.5)) == (2, 1, 1.0)
    assert Quantiles().quantile(0.5) is None


@given(st.lists(st.integers(0, 30), max_size=300), st.integers(2, 8), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_the_most_frequent_are_found_within_the_bound(values, size, step):
    """Misra and Gries: no count too high, none too low by more than the error, n / (size + 1) at most."""
    found = Frequent(size)
    for i in range(0, len(values), step):
        part = Frequent(size)
        chunk = values[i : i + step]
        part.add(np.array(chunk, np.uint64), lambda k, chunk=chunk: str(chunk[k]))
        found.merge(Frequent.load(part.dump()))
    exact, counted = Counter(values), dict(zip(found.hashes.tolist(), found.counts.tolist(), strict=True))
    assert found.total == len(values)
    assert found.error <= len(values) / (size + 1)
    for value, count in exact.items():
        assert count - found.error <= counted.get(value, 0) <= count
    assert all(int(text) == value for value, text in found.examples.items())


def test_few_things_are_counted_exactly_and_with_examples():
    values = np.array([7] * 5 + [8] * 3 + [9], np.uint64)
    found = Frequent(10)
    found.add(values, lambda i: f"v{values[i]}")
    assert (found.error, found.top()) == (0, [("v7", 5), ("v8", 3)])
    assert found.shrunk(1).counts.tolist() == [2]
    assert found.shrunk(1).error == 3
