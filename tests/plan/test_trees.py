"""The promise: for any number of ranks there are two trees over which every rank sends and receives one
packet a step at most, in the number of steps that the closed formula is made of."""

import random

import pytest

from ropewalk.errors import UserError
from ropewalk.plan import collectives, trees

RANDOM = random.Random(0)
LARGE = [2**k + d for k in (9, 12, 14) for d in (-1, 0, 1)] + [
    RANDOM.randrange(1000, 30000) for _ in range(4)
]
LINK = collectives.Link(5e-6, 1 / 50e9)


def depths(parents):
    depth = [0] + [-1] * (len(parents) - 1)
    for rank in range(len(parents)):
        path = []
        while depth[rank] < 0:
            path.append(rank)
            rank = parents[rank]
            assert len(path) <= len(parents), "a cycle"
        for below, each in enumerate(reversed(path), 1):
            depth[each] = depth[rank] + below
    return depth


def check(p):
    both = trees.double_tree(p)
    colours = trees.colours(both)
    children = {}
    for tree in (0, 1):
        assert both[tree][0] == -1
        assert all(0 <= parent < p for parent in both[tree][1:])
        assert max(depths(both[tree])) == (p - 1).bit_length()
        for rank in range(1, p):
            children.setdefault(both[tree][rank], []).append((tree, colours[tree][rank]))
    for rank, edges in children.items():
        assert len(edges) <= 2
        assert len({colour for _, colour in edges}) == len(edges), "two packets out in a step"
        if rank:
            assert len({tree for tree, _ in edges}) == 1, "an inner rank of both trees"
    for rank in range(1, p):
        assert {colours[0][rank], colours[1][rank]} == {0, 1}, "two packets in in a step"


def test_the_trees_of_all_small_sizes():
    for p in range(1, 400):
        check(p)


@pytest.mark.parametrize("p", LARGE)
def test_the_trees_of_large_sizes(p):
    check(p)


def test_the_shape_of_a_small_one():
    """Eight ranks: 4 above 2 and 6 above the odd ones; then everyone one place on."""
    first, second = trees.double_tree(8)
    assert first == [-1, 2, 4, 2, 0, 6, 4, 6]
    assert second == [-1, 3, 1, 0, 5, 3, 5, 1]


def test_the_steps_are_those_of_the_formula():
    """2k + 2 ceil(lg p) - 2 or one less, whatever p: packets down each tree, two steps for each level."""
    for p in [*range(2, 140), *LARGE[:6]]:
        for packets in (1, 2, 7, 30) if p < 140 else (5,):
            bound = 2 * packets + 2 * (p - 1).bit_length() - 2
            assert bound - 1 <= trees.steps(p, packets) <= bound
    assert trees.steps(1, 5) == 0


@pytest.mark.parametrize(("p", "worst"), [(8, 0.23), (17, 0.25), (100, 0.13), (128, 0.13), (1024, 0.14)])
def test_simulated_seconds_against_the_closed_form(p, worst):
    """The formula is the upper one, by two steps of some: 13% of a small message, nothing of a large one."""
    ratio = [
        trees.broadcast_seconds(n, p, LINK) / collectives.two_tree_broadcast(n, p, LINK)
        for n in (2**16, 2**20, 2**24, 2**28, 2**30)
    ]
    assert all(1 - worst <= each <= 1.001 for each in ratio)
    assert min(ratio[3:]) > 0.97


def test_the_best_number_of_packets_is_hard_to_beat():
    best = trees.broadcast_seconds(2**24, 100, LINK)
    assert best <= 1.001 * min(trees.broadcast_seconds(2**24, 100, LINK, k) for k in range(1, 60))
    assert trees.broadcast_seconds(0, 8, LINK) == trees.broadcast_seconds(1e9, 1, LINK) == 0
    assert trees.broadcast_seconds(8, 4, collectives.Link(0, 1)) == pytest.approx(
        10
    )  # 4 packets of a byte a tree


@pytest.mark.parametrize("nonsense", [lambda: trees.double_tree(0), lambda: trees.steps(4, 0)])
def test_nonsense(nonsense):
    with pytest.raises(UserError):
        nonsense()
