"""Who is called slow; tests/parallel/test_faults.py has a process that really is."""

import time

import pytest
import torch

from ropewalk.layout import Layout
from ropewalk.train.stragglers import BlockTimer, Paces, sentence, slow


@pytest.mark.parametrize(
    ("own", "seconds", "wanted"),
    [
        ([1.0, 1.0], 2.0, []),
        ([1.0, 1.6], 2.0, [1]),
        ([1.6, 1.0], 2.0, [0]),
        ([1.0, 1.4], 2.0, []),  # not so slow
        ([0.01, 0.02], 2.0, []),  # it makes nobody wait
        ([1.0, 1.1, 0.9, 3.0], 4.0, [3]),
        ([1.0, 3.0, 0.9, 3.0], 4.0, [1, 3]),
        ([3.0, 3.0, 1.0, 3.0], 4.0, []),  # one is fast
        ([0.0, 0.0, 0.0, 0.5], 1.0, [3]),
    ],
)
def test_slow_is_what_takes_much_longer_than_the_median(
    own: list[float], seconds: float, wanted: list[int]
) -> None:
    assert slow(own, seconds) == wanted


class Others:
    """A world of three, in which the process asked about is the first."""

    size, layout = 3, Layout(replicate=3, shard=1)

    def __init__(self) -> None:
        self.others = [[1.0, 0.1, 0.2, 0.0], [1.0, 0.1, 0.2, 0.0]]

    def each(self, value: tuple[str, list[float]]) -> list[tuple[str, list[float]]]:
        return [value, *((f"node{i}", sums) for i, sums in enumerate(self.others, 1))]


def test_a_process_is_named_when_it_stays_slow_and_not_for_one_bad_moment() -> None:
    world = Others()
    paces = Paces(world)  # type: ignore[arg-type]

    def look(waits: float) -> list[int]:
        world.others[1] = [1.0, waits, 0.2, 0.0]
        for _ in range(10):
            assert paces.look(7) == []
            paces.begin()
            paces.add(0.1, 0.01, 0.0)
        found = paces.look(7)
        for record in found:
            assert record["host"] == "node2"
            assert "process 2 on node2 is slow: " in sentence(record)
        return [record["rank"] for record in found]

    assert [look(waits) for waits in (0.8, 0.1, 0.8, 0.8, 0.8, 0.1, 0.8)] == [[], [], [], [2], [2], [], []]


def test_the_stages_of_a_pipeline_are_compared_by_the_time_of_a_block() -> None:
    """One with three times the blocks takes three times as long, and is not slow."""
    world = Others()
    world.layout = Layout(pipeline=3, shard=1)
    blocks = [torch.nn.Identity() for _ in range(3)]
    paces = Paces(world, blocks)  # type: ignore[arg-type]
    paces._timer.take = lambda: 0.06  # type: ignore[method-assign]
    world.others = [[1.0, 0.0, 0.2, 0.0], [1.0, 0.0, 0.2, 0.0]]
    for _ in range(2):
        for _ in range(10):
            paces.begin()
            paces.add(0.1, 0.0, 0.0)
        assert paces._sums[2] == pytest.approx(0.2)
        assert paces.look(7) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_on_a_gpu_are_timed_by_events() -> None:
    block = torch.nn.Linear(4096, 4096).cuda()
    timer, x = BlockTimer([block], "cuda"), torch.randn(8192, 4096, device="cuda")
    block(x)
    torch.cuda.synchronize()
    timer.begin()
    began = time.perf_counter()
    for _ in range(20):
        block(x)
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    assert 0.5 * taken < timer.take() <= taken


def test_blocks_are_timed_without_what_comes_before_and_after() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x

    blocks = [Block(), Block()]
    for block in blocks:  # as fully_shard does
        block.register_forward_pre_hook(lambda *_: time.sleep(0.05), prepend=True)
        block.register_forward_hook(lambda *_: time.sleep(0.05))
    timer = BlockTimer(blocks)
    blocks[0](torch.zeros(1))
    timer.begin()
    for block in blocks:
        block(torch.zeros(1))
    assert 0.02 <= timer.take() < 0.05
    assert timer.take() == 0.0
