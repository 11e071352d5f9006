"""The promise: where there is a closed formula the simulation equals it, links are shared max-min fair, and
what is oversubscribed, slow or dead costs what it must."""

import math

import numpy as np
import pytest

from ropewalk.errors import UserError
from ropewalk.plan import collectives as c
from ropewalk.plan import network_simulator as net

LINK = c.Link(5e-6, 1 / 50e9)
NVLINK = c.Link(2e-6, 1 / 450e9)
N = 1e9


@pytest.mark.parametrize("p", [2, 3, 8, 33])
@pytest.mark.parametrize("n", [1e3, 1e9])
def test_a_ring_on_a_free_network_is_the_formula(p, n):
    switch = net.fat_tree(1, p, LINK)
    assert net.seconds(switch, net.ring(range(p), n)) == pytest.approx(c.ring_all_reduce(n, p, LINK))
    gathered = net.ring(range(p), n, "all_gather")
    assert net.seconds(switch, gathered) == pytest.approx(c.ring_all_gather(n, p, LINK))


def test_a_torus_side_is_a_ring_and_two_ways_round_are_twice_one():
    ring = net.torus((8,), LINK)
    one_way = net.ring(range(8), N)
    assert net.seconds(ring, one_way) == pytest.approx(c.ring_all_reduce(N, 8, LINK))
    both = net.together(net.ring(range(8), N / 2), net.ring(range(7, -1, -1), N / 2))
    assert net.seconds(ring, both) == pytest.approx(c.torus_all_reduce(N, (8,), LINK))
    # four rings along the four rows of a square do not meet
    rows = net.together(*(net.ring(range(4 * row, 4 * row + 4), N) for row in range(4)))
    assert net.seconds(net.torus((4, 4), LINK), rows) == pytest.approx(c.ring_all_reduce(N, 4, LINK))


@pytest.mark.parametrize("sides", [(2,), (6,), (7,), (8,), (4, 4), (3, 5), (4, 8), (2, 2, 2), (4, 4, 4)])
def test_all_to_all_on_a_torus_is_limited_by_its_bisection(sides):
    free = c.Link(0, 1 / 50e9)
    p = math.prod(sides)
    took = net.seconds(net.torus(sides, free), net.all_to_all(range(p), N))
    assert took == pytest.approx(c.torus_all_to_all(N, sides, free))
    if all(side % 2 == 0 for side in sides):  # a quarter of all bytes goes from the one half to the other
        assert took == pytest.approx(p * N / 4 / c.torus_bisection(sides, 50e9))


def test_all_to_all_on_a_switch_is_limited_by_its_ends():
    took = net.seconds(net.fat_tree(1, 24, LINK), net.all_to_all(range(24), N))
    assert took == pytest.approx(5e-6 + N * 23 / 24 / 50e9)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_oversubscription_slows_what_crosses_pods(k):
    """Each of 4 pods has 8 ranks and 1/k of their bandwidth upwards; all of one pod talk to all of others."""
    tree = net.fat_tree(4, 8, LINK, k)
    across = [each for each in net.all_to_all(range(32), N) if each.source // 8 != each.target // 8]
    assert net.seconds(tree, across) == pytest.approx(5e-6 + k * N * 24 / 32 / 50e9)
    inside = net.together(*(net.all_to_all(range(8 * pod, 8 * pod + 8), N) for pod in range(4)))
    assert net.seconds(tree, inside) == pytest.approx(5e-6 + N * 7 / 8 / 50e9)
    # a ring has one rank in a pod that sends out of it, so it does not mind until k exceeds 8
    assert net.seconds(tree, net.ring(range(32), N)) == pytest.approx(c.ring_all_reduce(N, 32, LINK))


def test_rails():
    """Rings on all rails at once do not meet; an all-to-all, relayed inside, keeps all rails as busy."""
    cluster = net.rails(4, 8, NVLINK, LINK)
    rings = net.together(*(net.ring(range(gpu, 32, 8), N) for gpu in range(8)))
    assert net.seconds(cluster, rings) == pytest.approx(c.ring_all_reduce(N, 4, LINK))
    between = N * 24 / 32 / 50e9
    assert net.seconds(cluster, net.all_to_all(range(32), N)) == pytest.approx(between, rel=2e-3)
    inside = net.ring(range(8), N)
    assert net.seconds(cluster, inside) == pytest.approx(c.ring_all_reduce(N, 8, NVLINK))


def test_rings_over_all_cards_are_the_rails_of_the_formula():
    """Ring i enters a node at GPU i and leaves at the one before it, the next node the other way round."""
    for gpus, nodes, inside in ((4, 2, 1 / 60e9), (4, 4, 1 / 450e9), (2, 6, 1 / 20e9)):
        near, far = c.Link(0, inside), c.Link(0, 1 / 50e9)

        def order(first, gpus=gpus, nodes=nodes):
            there = [(first + step) % gpus for step in range(gpus)]
            return [node * gpus + gpu for node in range(nodes) for gpu in there[:: -1 if node % 2 else 1]]

        rings = net.together(*(net.ring(order(first), N / gpus) for first in range(gpus)))
        took = net.seconds(net.rails(nodes, gpus, near, far), rings)
        formula = 2 * c._rails(N, c.Level(gpus, near), c.Level(nodes, far))
        assert took == pytest.approx(formula, rel=0.01)


def test_a_slow_link_slows_the_whole_ring():
    free = c.Link(0, 1 / 50e9)
    for network, wire in (
        (net.torus((8,), free), (3, 4, "+0")),
        (net.fat_tree(2, 4, free), (3, "pod 0")),
        (net.rails(1, 8, free, free), ("node 0", 3)),
    ):
        usual = net.seconds(network, net.ring(range(8), N))
        assert net.seconds(network.slowed(wire, 4), net.ring(range(8), N)) == pytest.approx(4 * usual)
    trunk = net.fat_tree(2, 4, free).slowed(("pod 0", "core"), 4)  # four times as wide as what the ring sends
    assert net.seconds(trunk, net.ring(range(8), N)) == pytest.approx(c.ring_all_reduce(N, 8, free))


def test_around_a_dead_link():
    """The other way round a torus: free for a ring that runs one way, shared by one that runs both."""
    free = c.Link(0, 1 / 50e9)
    whole = net.torus((8,), free)
    cut = whole.without((3, 4, "+0"))
    assert len(cut.paths(3, 4)[0]) == 7
    one_way = net.ring(range(8), N)
    assert net.seconds(cut, one_way) == pytest.approx(net.seconds(whole, one_way))
    both = net.together(net.ring(range(8), N / 2), net.ring(range(7, -1, -1), N / 2))
    assert net.seconds(cut, both) > 1.4 * net.seconds(whole, both)
    # a GPU whose card is dead sends over its neighbour's, which is then shared
    cluster = net.rails(4, 8, NVLINK, LINK)
    assert cluster.without((3, "rail 3")).paths(3, 11)[0][0] == (3, "node 0")
    everyone = net.all_to_all(range(32), N)
    ratio = net.seconds(cluster.without((3, "rail 3")), everyone) / net.seconds(cluster, everyone)
    assert 1.1 < ratio < 2.1


def test_what_is_cut_off_never_arrives():
    tree = net.fat_tree(1, 8, LINK).without((3, "pod 0"))
    assert tree.paths(3, 4) == []
    assert net.seconds(tree, net.ring(range(8), N)) == math.inf
    arrived = net.arrivals(tree, net.all_to_all(range(8), N))
    assert np.isinf(arrived).sum() == 7  # what 3 sends
    assert net.arrivals(tree, [net.Message(3, 4, 1.0), net.Message(0, 1, 1.0, after=(0,))]).min() == math.inf


def test_sharing_is_max_min_fair():
    """Every flow is held up by a full link on which none is faster: that defines max-min fairness."""
    random = np.random.default_rng(0)
    for trial in range(30):
        network = net.torus((4, 3), c.Link(0, 1.0))
        for wire in list(network.links):
            network = network.slowed(wire, random.uniform(0.5, 4))
        pairs = [random.choice(12, 2, replace=False) for _ in range(3 + trial)]
        flows = net._Flows(network, [net.Message(int(a), int(b), 1.0) for a, b in pairs])
        rate = flows.rates(np.arange(len(flows.size)))
        used = np.zeros(len(network.links))
        paths = [flows.wires[b : b + n] for b, n in zip(flows.begin, flows.count, strict=True)]
        for path, speed in zip(paths, rate, strict=True):
            used[path] += speed
        assert (used <= flows.room * (1 + 1e-9)).all()
        for path, speed in zip(paths, rate, strict=True):
            full = [wire for wire in path if used[wire] > flows.room[wire] * (1 - 1e-9)]
            assert any(
                speed >= max(r for q, r in zip(paths, rate, strict=True) if w in q) * (1 - 1e-9) for w in full
            )


def test_two_that_share_and_one_that_leaves():
    """By hand: 3 and 1 bytes over one link of 1 per second; then two more that wait, with nothing to do."""
    pair = net.fat_tree(1, 3, c.Link(0.5, 1.0))
    messages = [net.Message(0, 1, 3.0), net.Message(0, 2, 1.0)]
    assert net.arrivals(pair, messages) == pytest.approx([4.5, 2.5])
    messages += [net.Message(2, 1, 0.0, after=(1,)), net.Message(1, 1, 9.0, after=(2,))]
    assert net.arrivals(pair, messages) == pytest.approx([4.5, 2.5, 3.0, 3.0])
    assert net.seconds(pair, []) == 0


def test_small_messages_late_in_a_long_run():
    """A time that is lost in rounding beside the clock still ends."""
    pair = net.fat_tree(1, 2, c.Link(0, 1e-12))
    messages = [net.Message(0, 1, 1e16)] + [net.Message(0, 1, 1.0, after=(0,)) for _ in range(3)]
    assert net.seconds(pair, messages) == pytest.approx(1e4)


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: net.fat_tree(0, 8, LINK),
        lambda: net.fat_tree(2, 8, LINK, 0),
        lambda: net.rails(1, 0, LINK, LINK),
        lambda: net.torus((), LINK),
        lambda: net.torus((4, 0), LINK),
        lambda: net.torus((4,), LINK).slowed((0, 1, "+0"), 0),
        lambda: net.torus((4,), LINK).without((0, 2, "+0")),
        lambda: net.ring(range(4), N, "broadcast"),
        lambda: net.seconds(net.torus((4,), LINK), [net.Message(0, 4, 1.0)]),
        lambda: net.seconds(net.torus((4,), LINK), [net.Message(0, 1, math.nan)]),
        lambda: net.seconds(net.torus((4,), LINK), [net.Message(0, 1, 1.0, after=(0,))]),
        lambda: net.seconds(net.torus((4,), c.Link(1, 0)), [net.Message(0, 1, 1.0)]),
    ],
)
def test_nonsense_is_one_plain_message(nonsense):
    with pytest.raises(UserError) as failure:
        nonsense()
    assert "\n" not in str(failure.value)
