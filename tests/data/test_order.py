"""Mixtures, curricula and packings: what every epoch holds is exact, and every row is found at once."""

import json
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data import Loader, TokenShards, prefetch
from ropewalk.data.order import STAGES
from ropewalk.errors import UserError

FIELDS = ("tokens", "labels", "positions", "segments")
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = 16
PACKINGS = st.sampled_from(["best_fit", "none", "concat"])
MIXTURES = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"temperature": st.sampled_from([1.5, 3.0, 100.0])}),
    st.fixed_dictionaries(
        {"weights": st.fixed_dictionaries({"even": st.floats(0.1, 9.0), "odd": st.floats(0.1, 9.0)})}
    ),
)
CURRICULA = st.sampled_from(["none", "length", "score"])


@st.composite
def settings_of_a_run(draw):
    """(lengths, scores, packing, keyword arguments of a Loader); with concat, documents longer than rows."""
    packing = draw(PACKINGS)
    longest = 60 if packing == "concat" else ROW
    lengths = draw(st.lists(st.integers(1, longest), min_size=2, max_size=30))
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.5, -2.0, 7.0]), min_size=30, max_size=30))
    options = {**draw(MIXTURES), "curriculum": draw(CURRICULA), "seed": draw(st.integers(0, 3))}
    return lengths, scores[: len(lengths)], packing, options


def seen(loader, epoch_rows):
    """How often each token of each document comes in some rows, [document] -> array by token."""
    found = {i: np.zeros(n, dtype=int) for i, n in enumerate(loader.shards.lengths.tolist())}
    first, count = epoch_rows
    pieces = loader.order.pieces(first, count)
    for document, offset, length in zip(pieces.documents, pieces.offsets, pieces.lengths, strict=True):
        assert length > 0
        found[int(document)][offset : offset + length] += 1
    return found


@QUICK
@given(case=settings_of_a_run(), epochs=st.integers(1, 4))
def test_each_epoch_has_each_document_exactly_its_stated_number_of_times(case, epochs, make_shards):
    """Whole, every token as often as the others; over the epochs, within one of what the repeats come to."""
    lengths, scores, packing, options = case
    shards = make_shards(lengths, scores=scores)
    loader = Loader(shards, ROW, packing, **options)
    names, codes = shards.sources
    repeats = loader.mixture.repeats()
    total, first = Counter(), 0
    for epoch in range(epochs):
        rows = loader.rows_per_epoch(epoch)
        for document, times in seen(loader, (first, rows)).items():
            assert len(set(times.tolist())) == 1, "a document is lost or doubled in part"
            stated = repeats[names[codes[document]]] if loader.mixture.parts else 1.0
            assert abs(int(times[0]) - stated) < 1, "exact where it is a whole number"
            total[document] += int(times[0])
        first += rows
    for code, name in enumerate(names):
        mine = [total[i] for i in np.flatnonzero(codes == code).tolist()]
        assert max(mine) - min(mine) <= 1, "nothing comes again before the rest of its source"
        if loader.mixture.parts:
            assert sum(mine) == round(epochs * repeats[name] * len(mine))


@QUICK
@given(case=settings_of_a_run(), shard_tokens=st.sampled_from([64, 1000]))
def test_rows_are_what_their_pieces_are_token_by_token(case, shard_tokens, make_shards):
    lengths, scores, packing, options = case
    shards = make_shards(lengths, seed=len(lengths), scores=scores, shard_tokens=shard_tokens)
    loader = Loader(shards, ROW, packing, pad_id=7, **options)
    count = loader.rows_per_epoch() + 3
    pieces, batch = loader.order.pieces(0, count), loader.batch(0, count)
    ends = np.cumsum(pieces.counts)
    for row, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        wanted = {name: [] for name in FIELDS}
        for segment, piece in enumerate(range(begin, end)):
            document = shards.document(int(pieces.documents[piece]))
            offset, length = int(pieces.offsets[piece]), int(pieces.lengths[piece])
            assert batch.documents[row][segment] == document.id
            for i in range(offset, offset + length):
                goes_on = i + 1 < offset + length and document.scored[i + 1]
                wanted["tokens"].append(int(document.tokens[i]))
                wanted["labels"].append(int(document.tokens[i + 1]) if goes_on else -100)
                wanted["positions"].append(i - offset)
                wanted["segments"].append(segment)
        rest = ROW - len(wanted["tokens"])
        for name, padding in zip(FIELDS, (7, -100, 0, -1), strict=True):
            assert getattr(batch, name)[row].tolist() == wanted[name] + [padding] * rest, name


@QUICK
@given(
    case=settings_of_a_run(),
    world=st.sampled_from([1, 2, 4]),
    restart=st.integers(0, 5),
    other_world=st.sampled_from([1, 2, 4]),
    ahead=st.booleans(),
)
def test_processes_prefetching_and_restarts_leave_the_stream_alone(
    case, world, restart, other_world, ahead, make_shards
):
    """Six steps of four rows: shared out among `world` processes and, after a restart, `other_world`."""
    lengths, scores, packing, options = case
    shards = make_shards(lengths, scores=scores)
    steps, rows = 6, 4

    def steps_of(first, last, processes):
        """What all processes together read in some steps, each with a loader of its own."""
        own = rows // processes
        parts = []
        for process in range(processes):
            loader = Loader(shards, ROW, packing, **options)
            firsts = range(first * rows + process * own, last * rows, rows)
            read = prefetch(loader, firsts, own) if ahead else (loader.batch(n, own) for n in firsts)
            parts.append(list(read))
        return [part for step in zip(*parts, strict=True) for part in step]

    batches = steps_of(0, restart, world) + steps_of(restart, steps, other_world)
    whole = Loader(shards, ROW, packing, **options).batch(0, steps * rows)
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(whole, name))
    names = chain.from_iterable(batch.documents for batch in batches)
    assert tuple(names) == whole.documents


@QUICK
@given(case=settings_of_a_run(), samples=st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_a_sample_is_found_without_those_before_it(case, samples, make_shards):
    lengths, scores, packing, options = case
    shards = make_shards(lengths, scores=scores)
    counted = Loader(shards, ROW, packing, **options)
    for sample in samples:
        epoch, row = 0, sample
        while row >= counted.rows_per_epoch(epoch):
            row -= counted.rows_per_epoch(epoch)
            epoch += 1
        fresh = Loader(shards, ROW, packing, **options)
        assert fresh.order.find(sample) == (epoch, row)
        assert fresh.epochs(sample) == pytest.approx(epoch + row / counted.rows_per_epoch(epoch))


def test_weights_are_shares_of_the_tokens(make_shards):
    """Sources of 9,000 and 1,000 tokens, wanted half and half: an epoch is still 10,000 tokens."""
    lengths = [10] * 900 + [20] * 50
    shards = make_shards(lengths, sources=["web"] * 900 + ["wiki"] * 50)
    loader = Loader(shards, 32, weights={"web": 3, "wiki": 3})
    assert loader.mixture.repeats() == pytest.approx({"web": 5 / 9, "wiki": 5.0})
    assert loader.passes(2 * loader.rows_per_epoch()) == pytest.approx(
        {"web": 10 / 9, "wiki": 10.0}, rel=0.02
    )
    taken = loader.order.pieces(0, loader.rows_per_epoch()).documents
    assert Counter((taken >= 900).tolist()) == {False: 500, True: 250}


def test_a_temperature_gives_small_sources_more(make_shards):
    """Shares as the roots of 8,100 and 900 tokens: 3 to 1; at 1, each document once."""
    shards = make_shards([9] * 1000, sources=["large"] * 900 + ["small"] * 100)
    warm = Loader(shards, 32, temperature=2.0).mixture
    assert warm.repeats() == pytest.approx({"large": 750 / 900, "small": 250 / 100}, rel=0.01)
    assert Loader(shards, 32, temperature=1.0).mixture.repeats() == {"": 1.0}


def test_weights_that_repeat_nothing_give_the_order_without_weights(make_shards):
    lengths = [3, 9, 5, 12, 7, 2] * 5
    shards = make_shards(lengths)
    share = {"even": sum(lengths[::2]), "odd": sum(lengths[1::2])}
    plain, weighted = Loader(shards, 16), Loader(shards, 16, weights=share)
    assert weighted.batch(0, 40).documents == plain.batch(0, 40).documents


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"even": 1}, r"source 'odd' has no weight; give all or none one"),
        ({"even": 1, "odd": 1, "new": 1}, r"source 'new' has a weight and no document to train on"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(weights, message, make_shards):
    with pytest.raises(UserError, match=message):
        Loader(make_shards([4, 9]), 16, weights=weights)


def test_a_position_in_a_mixture_belongs_to_its_settings(make_shards):
    """What a checkpoint keeps tells other weights, and documents of other sources, apart."""
    shards = make_shards([4] * 20)
    other = make_shards([4] * 20, sources=["odd", "even"] * 10)
    weights = {"even": 1, "odd": 3}
    found = {
        json.dumps(Loader(data, 8, weights=given).state(8))
        for data, given in [(shards, None), (shards, weights), (shards, {"even": 3, "odd": 1})]
    }
    assert len(found) == 3
    assert Loader(other, 8, weights=weights).state(8) != Loader(shards, 8, weights=weights).state(8)


@pytest.mark.parametrize("packing", ["best_fit", "none", "concat"])
@pytest.mark.parametrize("curriculum", ["length", "score"])
def test_a_curriculum_goes_from_easy_to_hard_in_stages(packing, curriculum, make_shards):
    """The stages found by hand: documents in order, cut where another tenth of the tokens begins."""
    random = np.random.default_rng(0)
    lengths = random.permutation(np.arange(1, 201)).tolist()
    scores = random.permutation(200).astype(float).tolist()
    loader = Loader(make_shards(lengths, scores=scores), 256, packing, curriculum=curriculum)
    difficulty = lengths if curriculum == "length" else scores
    stage, before = {}, 0
    for document in sorted(range(200), key=lambda i: difficulty[i]):
        stage[document] = before * STAGES // sum(lengths)
        before += lengths[document]
    pieces = loader.order.pieces(0, loader.rows_per_epoch())
    rows = np.split(pieces.documents, np.cumsum(pieces.counts)[:-1])
    stages = [{stage[int(i)] for i in row} for row in rows]
    assert all(len(found) == 1 for found in stages), "no row has documents of two stages"
    order = [min(found) for found in stages]
    assert order == sorted(order)
    assert set(order) == set(range(STAGES))
    inside = [row for row, number in zip(rows, order, strict=True) if number == 4]
    found = [difficulty[int(i)] for i in chain.from_iterable(inside)]
    assert found != sorted(found), "at random inside a stage"


def test_a_curriculum_by_scores_needs_scores(make_shards):
    with pytest.raises(UserError, match=r"documents have no scores; set data\.curriculum to length or none"):
        Loader(make_shards([4, 9]), 16, curriculum="score")


def test_concat_cuts_long_documents_and_wastes_less_than_a_row(make_shards):
    lengths = [100, 3, 40, 1, 57]
    loader = Loader(make_shards(lengths), 16, "concat")
    assert loader.rows_per_epoch() == -(-sum(lengths) // 16)
    batch = loader.batch(0, loader.rows_per_epoch())
    assert int((batch.segments >= 0).sum()) == sum(lengths)
    assert max(map(int, batch.positions.flatten())) == 15, "positions stay below the row's length"
    cut = Counter(name for names in batch.documents for name in names)
    assert cut["d0"] >= 7, "100 tokens do not fit in six rows of 16"


def test_rows_of_concat_come_in_random_order(make_shards):
    """Else the pieces of a long document would come one after the other, often in one batch."""
    loader = Loader(make_shards([640] * 10), 16, "concat")
    names = [row[0] for row in loader.batch(0, loader.rows_per_epoch()).documents]
    assert sum(a == b for a, b in pairwise(names)) < 0.3 * len(names)


def test_scores_are_kept_and_part_of_the_content(make_shards):
    scored = make_shards([3, 4, 5], scores=[0.5, -1.0, 2.0])
    scored.verify()
    assert scored.scores.tolist() == [0.5, -1.0, 2.0]
    assert make_shards([3, 4, 5]).scores is None
    assert len({make_shards([3, 4, 5], scores=s).fingerprint for s in (None, [0, 0, 0], [0, 0, 1])}) == 3
    with pytest.raises(ValueError, match="all documents have a score, or none"):
        make_shards([3, 4], scores=[1.0, None])
    with pytest.raises(ValueError, match="its score is nan"):
        make_shards([3, 4], scores=[1.0, float("nan")])


def test_the_sources_of_documents_are_known(make_shards):
    shards = make_shards([3] * 4, sources=["b", "a", "b", "c"])
    names, codes = TokenShards.open(shards.directory).sources
    assert (names, codes.tolist()) == (["b", "a", "c"], [0, 1, 0, 2])
