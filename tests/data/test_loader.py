"""The order is a pure function, every document comes once in an epoch, and labels are what they should be."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data import Loader, ShardWriter, TokenShards, prefetch
from ropewalk.errors import UserError

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=40)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELDS = ("tokens", "labels", "positions", "segments")


def equal(one, other):
    return one.documents == other.documents and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS
    )


def joined(batches):
    parts = [torch.cat([getattr(b, name) for b in batches]) for name in FIELDS]
    return parts, sum((tuple(b.documents) for b in batches), ())


def reference_rows(batch, shards, length, pad):
    """The rows from their documents' names, token by token."""
    for names in batch.documents:
        tokens, labels, positions, segments = [], [], [], []
        for segment, name in enumerate(names):
            document = shards.document(int(name[1:]))
            for i, token in enumerate(document.tokens.tolist()):
                last = i + 1 == len(document.tokens)
                tokens.append(token)
                labels.append(-100 if last or not document.scored[i + 1] else int(document.tokens[i + 1]))
                positions.append(i)
                segments.append(segment)
        rest = length - len(tokens)
        assert rest >= 0
        yield tokens + [pad] * rest, labels + [-100] * rest, positions + [0] * rest, segments + [-1] * rest


@QUICK
@given(
    lengths=LENGTHS, packing=st.sampled_from(["best_fit", "none"]), shard_tokens=st.sampled_from([16, 1000])
)
def test_rows_are_what_the_obvious_way_gives(lengths, packing, shard_tokens, make_shards):
    shards = make_shards(lengths, seed=len(lengths), shard_tokens=shard_tokens)
    loader = Loader(shards, 16, packing, pad_id=7)
    batch = loader.batch(0, loader.rows_per_epoch(0))
    for i, row in enumerate(reference_rows(batch, shards, 16, 7)):
        for name, wanted in zip(FIELDS, row, strict=True):
            assert getattr(batch, name)[i].tolist() == wanted, name
    for name in FIELDS:
        assert getattr(batch, name).dtype == torch.int64


@QUICK
@given(lengths=LENGTHS, epoch=st.integers(0, 1000), seed=st.integers(-5, 2**40))
def test_every_document_comes_once_in_every_epoch(lengths, epoch, seed, make_shards):
    loader = Loader(make_shards(lengths), 16, seed=seed)
    rows = loader.rows_per_epoch(epoch)
    batch = loader.batch(epoch * rows, rows)
    assert sorted(n for names in batch.documents for n in names) == sorted(
        f"d{i}" for i in range(len(lengths))
    )
    assert int((batch.segments >= 0).sum()) == sum(lengths), "packed without loss"


@QUICK
@given(lengths=LENGTHS, first=st.integers(0, 60), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_how_the_rows_are_cut_into_batches_makes_no_difference(lengths, first, sizes, make_shards):
    """Over epoch borders too, in any order, and for a loader that has read something else before."""
    shards = make_shards(lengths)
    whole = Loader(shards, 16).batch(first, sum(sizes))
    loader, starts = Loader(shards, 16), np.cumsum([first, *sizes]).tolist()
    backwards = [
        loader.batch(start, size) for start, size in reversed(list(zip(starts, sizes, strict=False)))
    ]
    parts, documents = joined(backwards[::-1])
    assert documents == whole.documents
    assert all(torch.equal(part, getattr(whole, name)) for part, name in zip(parts, FIELDS, strict=True))


def test_seed_epoch_and_content_each_change_the_order(make_shards):
    lengths = [5, 9, 3, 12, 7, 2, 8] * 20
    shards = make_shards(lengths)

    def order(shards, seed=0, epoch=0):
        loader = Loader(shards, 16, seed=seed)
        rows = loader.rows_per_epoch(epoch)
        return loader.batch(epoch * rows, rows).documents

    orders = [
        order(shards),
        order(shards, seed=1),
        order(shards, epoch=1),
        order(make_shards(lengths, seed=1)),
    ]
    assert len(set(orders)) == 4
    neighbours = [frozenset(frozenset(row) for row in rows if len(row) > 1) for rows in orders]
    assert all(len(a & b) < len(a) / 2 for a, b in pairwise(neighbours)), (
        "documents meet others in every epoch"
    )
    assert order(shards) == order(make_shards(lengths)), "other folder, same content, same order"


def test_rows_are_in_random_order(make_shards):
    """The packing makes rows with long documents first; none of that may be left."""
    loader = Loader(make_shards(list(range(1, 65)) * 40), 64)
    rows = loader.rows_per_epoch()
    longest = [int(row.max()) for row in loader.batch(0, rows).positions]
    half = rows // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 3


def test_the_order_of_today_is_the_order_of_tomorrow(tmp_path):
    """Written down once: a resumed run would silently see other data if this changed."""
    folder = tmp_path / "train"
    writer = ShardWriter(folder, 1000)
    for i, length in enumerate([4, 6, 2, 8, 3, 5, 7, 2]):
        writer.add(np.arange(length) + i, np.ones(length, dtype=bool), f"d{i}", "s")
    writer.close()
    loader = Loader(TokenShards.open(folder), 8, seed=3)
    assert loader.shards.fingerprint.startswith("8ef9382967762f27")
    assert loader.batch(0, 5).documents == (("d6",), ("d3",), ("d5", "d4"), ("d0", "d2"), ("d1", "d7"))
    assert loader.batch(5, 5).documents == (("d1", "d7"), ("d5", "d4"), ("d3",), ("d0", "d2"), ("d6",))


def test_state_is_all_there_is_to_a_position(make_shards):
    loader = Loader(make_shards([4, 6]), 8, seed=3)
    assert loader.state(12) == {"fingerprint": loader.shards.fingerprint, "seed": 3, "samples_seen": 12}


def test_batch_size_is_the_number_of_rows_where_none_is_said(make_shards):
    loader = Loader(make_shards([4, 6, 8]), 8, batch_size=2)
    assert equal(loader.batch(1), loader.batch(1, 2))


def test_rows_of_a_batch_know_their_own_documents(make_shards):
    """Micro-batches name only what is in them, as often as they are cut."""
    batch = Loader(make_shards([4, 6, 8, 1, 2, 3, 9, 5, 5]), 10).batch(0, 5)
    names = tuple(batch.documents)
    assert len(names) == len(batch.documents) == 5
    for a, b in ((0, 2), (2, 5), (1, 1), (3, 9)):
        assert batch.rows(a, b).documents == names[a:b]
        assert batch.rows(a, b).rows(1, 2).documents == names[a:b][1:2]
    assert batch.documents[-1] == names[-1]
    assert batch.documents[::-2] == names[::-2]


def test_documents_that_do_not_fit_are_refused(make_shards):
    with pytest.raises(UserError, match=r"a document of 9 tokens, and rows are 8 long"):
        Loader(make_shards([4, 9]), 8)


def test_prefetch_gives_the_loaders_batches(make_shards):
    loader = Loader(make_shards([3, 5, 8, 2, 6, 4]), 8, seed=1)
    ahead = list(prefetch(loader, range(2, 23, 3), rows=3))
    assert len(ahead) == 7
    assert all(equal(batch, loader.batch(2 + 3 * i, 3)) for i, batch in enumerate(ahead))


class Failing:
    def batch(self, first, rows):
        if first >= 4:
            raise OSError("the disk is gone")
        return first


def test_an_error_of_the_prefetching_thread_is_raised_after_the_good_batches():
    batches = prefetch(Failing(), range(0, 18, 2), 2)
    assert next(batches) == 0
    assert next(batches) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_closing_ends_the_prefetching_thread(make_shards):
    before = threading.active_count()
    for taken in (0, 1, 3):
        batches = prefetch(Loader(make_shards([3, 5, 8]), 8), range(1_000_000), 1)
        for _ in range(taken):
            next(batches)
        begin = time.monotonic()
        batches.close()
        assert time.monotonic() - begin < 5
    assert threading.active_count() == before


def test_prefetching_stays_a_few_batches_ahead():
    asked = []

    class Counting:
        def batch(self, first, rows):
            asked.append(first)
            return first

    batches = prefetch(Counting(), range(1000), 1, depth=2)
    next(batches)
    time.sleep(0.3)
    assert len(asked) <= 4
    batches.close()
