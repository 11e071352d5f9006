"""Equal hashes are found whatever order they come in; union-find gives the connected parts."""

import random
from collections import defaultdict

import numpy as np
import pytest

from ropewalk.clean.duplicates.rows import Clusters
from ropewalk.clean.duplicates.spill import Spill


@pytest.mark.parametrize("count", [0, 1, 500])
def test_groups_are_those_of_a_dictionary(count):
    rng = np.random.default_rng(count)
    key = rng.integers(0, 2**64, 200, dtype=np.uint64)[rng.integers(0, 200, count)]
    check = rng.integers(0, 2, count, dtype=np.uint64)  # equal keys whose other half differs are not equal
    order = rng.permutation(count)
    expected = defaultdict(list)
    for k, c, o in zip(key, check, order, strict=True):
        expected[k, c].append(int(o))
    with Spill() as spill:
        for begin in range(0, count, 77):
            here = slice(begin, begin + 77)
            spill.add(key[here], check[here], order[here])
        found = defaultdict(list)
        for orders, first in spill.groups():
            for one, lowest in zip(orders.tolist(), first.tolist(), strict=True):
                found[lowest].append(one)
    assert dict(found) == {min(group): sorted(group) for group in expected.values() if len(group) > 1}


def test_clusters_are_the_connected_parts_and_named_by_their_lowest():
    rng = random.Random(1)
    for _ in range(20):
        size = rng.randint(2, 60)
        edges = [(rng.randrange(size), rng.randrange(size)) for _ in range(rng.randint(1, size))]
        clusters = Clusters(size)
        for begin in range(0, len(edges), 7):
            left, right = np.array(edges[begin : begin + 7]).T
            clusters.join(left, right)
        label = list(range(size))
        for _ in range(size):
            for a, b in edges:
                label[a] = label[b] = min(label[a], label[b])
        assert clusters.roots(np.arange(size)).tolist() == label
