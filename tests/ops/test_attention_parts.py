"""Attention put together from parts of the keys is attention over all, and needs no masks of whole rows."""

from itertools import product
from typing import Any

import pytest
import torch

from ropewalk.ops import AttentionLayout, attention_parts, attention_reference
from ropewalk.ops.attention_parts import AttentionGradient, PartialAttention, Scores, block_of, tiles


def segments_of(generator: torch.Generator, rows: int, length: int, longest: int) -> torch.Tensor:
    """Random documents; the second row ends in padding."""
    sizes = torch.randint(1, longest + 1, (rows, length), generator=generator)
    found = [torch.arange(length).repeat_interleave(size)[:length] for size in sizes]
    segments = torch.stack(found)
    segments[1:2, length - 5 :] = -1
    return segments


def pieces(length: int, degree: int, index: int) -> list[tuple[int, int]]:
    """One from the beginning of the rows, one from the end."""
    size, last = length // (2 * degree), 2 * degree - 1 - index
    return [(index * size, (index + 1) * size), (last * size, (last + 1) * size)]


@pytest.mark.parametrize("seed", range(12))
def test_tiles_hold_each_pair_that_is_seen_once(seed: int) -> None:
    """And each query of a tile sees a key, without which there would be no sum to merge by."""
    generator = torch.Generator().manual_seed(seed)
    length, degree = 48, 2 + seed % 2
    window, block = (None, 7, 1)[seed % 3], (None, 5)[seed % 2]
    segments = segments_of(generator, 3, length, (6, 60)[seed // 6])
    layout = AttentionLayout.from_segments(segments)
    at = torch.arange(length)
    apart = at[:, None] - at
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] >= 0)
    seen &= (apart >= 0) & (apart < (window or length))
    for index in range(degree):
        mine = torch.cat([at[slice(*span)] for span in pieces(length, degree, index)])
        found = torch.zeros(3, len(mine), length, dtype=torch.int64)
        for source in range(degree):
            theirs = torch.cat([at[slice(*span)] for span in pieces(length, degree, source)])
            spans = pieces(length, degree, index), pieces(length, degree, source)
            for tile in tiles(layout, length, *spans, window, block):
                q, k = mine[tile.queries], theirs[tile.keys]
                assert q[0] - k[0] == tile.distance
                assert len(q) <= (block or length)
                inside = (q[:, None] >= k) & (q[:, None] - k < (window or length))
                assert inside.any(1).all()
                found[tile.rows, tile.queries.start : tile.queries.stop, k] += inside.long()
        assert torch.equal(found, seen[:, mine].long())


def test_all_have_as_much_to_do_and_no_mask_to_hold() -> None:
    """Of long documents: pieces from both ends balance, and masks are needed for windows only."""
    length, degree = 1 << 20, 4
    layout = AttentionLayout.rows(2, length)
    work = []
    for index in range(degree):
        found = tiles(layout, length, pieces(length, degree, index), [(0, length)], None, None)
        assert len(found) == (4 if index else 3)  # triangles and rectangles, of both rows at once
        areas = [
            (t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) / (2 if t.distance == 0 else 1)
            for t in found
        ]
        work.append(sum(areas))
        windowed = tiles(layout, length, pieces(length, degree, index), [(0, length)], 4096, None)
        assert all(t.queries.stop - t.queries.start <= 1024 for t in windowed)
        assert all(t.keys.stop - t.keys.start <= 4096 + 1024 for t in windowed)
    assert len(set(work)) == 1
    small = torch.empty(1, 2, 6, 8)
    assert attention_parts._mask(small, small, 0, None) == (True, None)
    assert attention_parts._mask(small, small, 5, None) == (False, None)


def attend(
    q: Any, k: Any, v: Any, grad: Any, segments: torch.Tensor, scores: Scores, degree: int
) -> list[torch.Tensor]:
    """What `degree` processes would have together: the result, and the gradients of q, k and v."""
    layout, length = AttentionLayout.from_segments(segments), q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    total = torch.zeros(2, *k.shape, dtype=wide, device=q.device)
    at = torch.arange(length)
    here = [torch.cat([at[slice(*s)] for s in pieces(length, degree, i)]) for i in range(degree)]
    for index in range(degree):
        mine = [t[:, here[index]] for t in (q, grad)]
        parts = [
            tiles(
                layout,
                length,
                pieces(length, degree, index),
                pieces(length, degree, source),
                scores.window,
                block_of(q, scores.softcap),
            )
            for source in range(degree)
        ]
        partial = PartialAttention(mine[0], scores)
        for source in range(degree):
            partial.add(torch.stack((k, v))[:, :, here[source]], parts[source])
        out[:, here[index]] = partial.result()
        gradient = AttentionGradient(mine[0], partial.result(), partial.logsumexp, mine[1], scores)
        for source in range(degree):
            total[:, :, here[source]] += gradient.of(torch.stack((k, v))[:, :, here[source]], parts[source])
        dq[:, here[index]] = gradient.queries()
    return [out, dq, *total]


def compare(device: str, dtype: torch.dtype, scores: Scores, allowed: float, dim: int, length: int) -> None:
    generator = torch.Generator().manual_seed(3)
    segments = segments_of(generator, 2, length, length)
    sizes = (6, 2, 2, 6)
    inputs = [torch.randn(2, length, n, dim, generator=generator, dtype=torch.float64) for n in sizes]
    q, k, v, grad = (t.to(device, dtype) for t in inputs)
    whole = [t.double().clone().requires_grad_() for t in (q, k, v)]
    wanted = attention_reference(*whole, segments.to(device), scores.window, scores.softcap, scores.scale)
    wanted.backward(grad.double())
    found = attend(q, k, v, grad, segments, scores, 2)
    for mine, theirs in zip(found, (wanted.detach(), *(t.grad for t in whole)), strict=True):
        assert (mine.double() - theirs).norm() < allowed * theirs.norm()


def flash_sees(rows: int, columns: int, causal: bool, left: int, right: int) -> torch.Tensor:
    """`[rows, columns]`: the rule of the flash kernel (its `mask.h` and `set_params_fprop`), in which a bound
    that is left out is not infinite, but as many keys as there are."""
    left, right = (-1 if bound >= columns else bound for bound in (left, right))
    if causal and rows > 1:
        right = 0
    if left < 0 and right < 0:
        return torch.ones(rows, columns, dtype=torch.bool)
    left, right = (columns if bound < 0 else bound for bound in (left, right))
    aligned = torch.arange(rows)[:, None] + columns - rows
    at = torch.arange(columns)
    return (at >= aligned - left) & (at <= aligned + right)


@pytest.mark.parametrize("seed", range(12))
def test_what_the_flash_kernel_is_told_is_the_tile(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rule, on the CPU: of each tile that it is given it sees what is to be seen."""
    monkeypatch.setattr(attention_parts, "_is_flash", lambda _: True)
    generator = torch.Generator().manual_seed(seed)
    length, degree, window = 512, 2, (None, 40, 130)[seed % 3]
    layout = AttentionLayout.from_segments(segments_of(generator, 3, length, (60, 600)[seed // 6]))
    scores, given = Scores(0.3, window), 0
    for index, source in product(range(degree), repeat=2):
        spans = pieces(length, degree, index), pieces(length, degree, source)
        for tile in tiles(layout, length, *spans, window, None):
            rows, columns = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
            q, k = torch.empty(1, 1, rows, 8), torch.empty(1, 1, columns, 8)
            if attention_parts._flash_takes(q, k, tile.distance, scores):
                given += 1
                causal, options = attention_parts._flash_options(
                    q.transpose(1, 2), k.transpose(1, 2), tile.distance, scores
                )
                bounds = int(options["window_size_left"]), int(options["window_size_right"])
                seen = attention_parts._seen(q, k, tile.distance, window)
                assert torch.equal(flash_sees(rows, columns, causal, *bounds), seen)
    assert given


FORMS = [Scores(0.3), Scores(0.3, 40), Scores(0.3, None, 3.0), Scores(0.3, 40, 3.0)]


@pytest.mark.parametrize("scores", FORMS, ids=str)
def test_parts_make_the_whole(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_parts, "_QUERY_BLOCK", 32)
    compare("cpu", torch.float64, scores, 1e-13, 8, 256)
    compare("cpu", torch.float32, scores, 1e-5, 8, 256)
    compare("cpu", torch.bfloat16, scores, 2e-2, 8, 256)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scores", FORMS, ids=str)
def test_parts_make_the_whole_on_a_gpu(scores: Scores) -> None:
    """bfloat16 by the flash kernel, the rest written out."""
    compare("cuda", torch.bfloat16, scores, 2e-2, 64, 512)
    compare("cuda", torch.float32, scores, 1e-2, 64, 512)  # by tf32 products, where those are on
    compare("cuda", torch.float64, scores, 1e-13, 64, 512)
