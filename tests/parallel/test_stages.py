"""Blocks are shared out evenly, and what a pipeline's schedule cannot do is known before it is built."""

import itertools
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ropewalk as rw
from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.model import Transformer
from ropewalk.model.families_config import config_from_hf
from ropewalk.parallel import pipeline_refusal, spans
from ropewalk.parallel.pipeline import SCHEDULES
from ropewalk.parallel.stages import keep_stages
from ropewalk.train.flops import stages_of
from ropewalk.train.pipelined import without_values

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "tie_word_embeddings": True,
}


def pipeline(**fields):
    return Layout(**{"shard": 1, "pipeline": 2, **fields})


def test_no_other_division_has_a_cheaper_costliest_stage():
    draw = torch.Generator().manual_seed(0)
    sizes = ((4, 2), (7, 3), (9, 4), (6, 6))
    for (count, stages), equal in itertools.product(sizes, (False, True)):
        costs = torch.randint(1, 20, (1 if equal else count,), generator=draw).tolist()
        costs *= count if equal else 1
        head = float(torch.randint(0, 30, (1,), generator=draw))

        def most(ends, costs=costs, head=head):
            parts = [sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True)]
            return max(*parts[:-1], parts[-1] + head)

        found = spans(costs, head, stages)
        assert [i for span in found for i in span] == list(range(count))
        assert all(found)
        best = min(most(ends) for ends in combinations(range(1, count), stages - 1))
        assert most([span.stop for span in found[:-1]]) == best


def test_a_costly_head_leaves_its_stage_fewer_blocks():
    config = config_from_hf(SHAPE)
    assert stages_of(config, 2) == (range(5), range(5, 8))  # the head costs 1.3 blocks
    assert stages_of(replace(config, vocab_size=32), 2) == (range(4), range(4, 8))
    wide = replace(config, vocab_size=1 << 17)
    assert stages_of(wide, 2) == (range(7), range(7, 8))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_torch_takes_the_micro_batches_that_we_take(schedule, processes):
    for each in (1, 2, 3):
        layout = pipeline(pipeline=processes, pipeline_schedule=schedule, pipeline_stages=each)
        if (schedule in ("gpipe", "1f1b") and each > 1) or (schedule == "zbv" and each != 2):
            continue
        for micro_batches in range(1, 13):
            stages = [
                SimpleNamespace(
                    num_stages=layout.stages,
                    group_size=processes,
                    group_rank=0,
                    stage_index=stage,
                    submod=nn.Identity(),
                    has_backward=True,
                )
                for stage in range(layout.stages)
                if layout.place(stage) == 0
            ]
            given = stages[0] if schedule in ("gpipe", "1f1b") else stages
            try:
                found = SCHEDULES[schedule](given, micro_batches, loss_fn=torch.sum)
            except ValueError:
                assert not layout.takes(micro_batches)
            else:
                assert layout.takes(micro_batches)
                places = getattr(found, "stage_index_to_group_rank", None)
                assert places in (None, {i: layout.place(i) for i in range(layout.stages)})


def test_more_stages_than_blocks_are_refused_with_the_nearest_degree():
    config = config_from_hf(SHAPE)
    assert pipeline_refusal(config, pipeline(pipeline=8)) is None
    assert pipeline_refusal(config, pipeline(pipeline=4, pipeline_schedule="zbv")) is None
    assert "set parallel.pipeline: 8" in pipeline_refusal(config, pipeline(pipeline=9))
    found = pipeline_refusal(config, pipeline(pipeline=6, pipeline_schedule="interleaved-zb"))
    assert "6 processes with 2 stages each need 12 blocks, and the model has 8" in found
    assert "set parallel.pipeline: 4" in found


def test_a_run_is_refused_before_a_process_is_started(make_recipe):
    recipe = make_recipe(batch_size=4, micro_batch_size=1) | {"parallel": {"pipeline": 4}}
    with pytest.raises(UserError, match=r"parallel\.pipeline: 4 processes need 4 blocks, .* has 2"):
        rw.train(recipe, progress=False)


def test_a_model_without_values_has_the_names_shapes_and_types():
    model = Transformer(config_from_hf(SHAPE))
    empty = without_values(model)
    known = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in empty.named_parameters()} == known
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_each_process_keeps_its_blocks_and_the_ends_what_is_outside_of_them(tied, schedule):
    config = config_from_hf(SHAPE | {"tie_word_embeddings": tied})
    layout = pipeline(pipeline=3, pipeline_schedule=schedule)
    kept = []
    for index in range(3):
        world = SimpleNamespace(layout=layout, index=lambda _, i=index: i, group=lambda _: None)
        model = Transformer(config)
        keep_stages(model, world, stages_of(config, layout.stages))
        kept.append({name for name, _ in model.named_parameters()})
        assert model.blocks_part.head == ("norm.weight" in kept[-1])
    whole = {name for name, _ in Transformer(config).named_parameters()}
    assert set.union(*kept) == whole
    twice = [name for name in whole if sum(name in names for names in kept) > 1]
    assert twice == (["embed.weight"] if tied and schedule == "1f1b" else [])
    last = 2 if schedule == "1f1b" else 0  # there and back
    assert "embed.weight" in kept[0]
    assert {"norm.weight", "embed.weight" if tied else "head.weight"} <= kept[last]
    assert all(name.startswith("blocks.") for name in kept[1])
