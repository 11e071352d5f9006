"""Packing loses nothing, overfills nothing, and is best-fit decreasing."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.packing import pack


def rows_of(packed):
    return [packed.lengths[a:b].tolist() for a, b in zip(packed.starts[:-1], packed.starts[1:], strict=True)]


def best_fit_decreasing(lengths, capacity):
    """One document at a time, over all rows: the algorithm as it is told."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
def test_equals_best_fit_decreasing_one_by_one(case):
    capacity, lengths = case
    rows = rows_of(pack(np.array(lengths, dtype=int), capacity))
    assert Counter(n for row in rows for n in row) == Counter(lengths)
    assert all(row for row in rows)
    assert sorted(capacity - sum(row) for row in rows) == sorted(best_fit_decreasing(lengths, capacity))


@given(st.lists(st.integers(1, 9), max_size=30))
def test_none_is_a_row_for_each(lengths):
    rows = rows_of(pack(np.array(lengths, dtype=int), 9, "none"))
    assert sorted(rows) == sorted([n] for n in lengths)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11], [-1]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="must be from 1 to 10"):
        pack(np.array(lengths), 10)


def test_a_million_documents_take_seconds():
    lengths = np.random.default_rng(0).integers(1, 32_769, 1_000_000)
    begin = time.process_time()
    packed = pack(lengths, 32_768)
    assert time.process_time() - begin < 30, "it takes about one second; a quadratic algorithm takes days"
    assert lengths.sum() / (len(packed) * 32_768) > 0.99
