"""Memory savers and optimizers in the real loop: they change what they say, and each resumes exactly."""

import json
import shutil

import pytest
import torch

import ropewalk as rw
from ropewalk.data import Loader, prepare
from ropewalk.errors import RopewalkError, UserError
from ropewalk.recipe import load_recipe
from ropewalk.train import loop
from ropewalk.train.validate import validation_loss


def run(recipe):
    return rw.train(recipe, progress=False)


SAME = {
    "full checkpointing": dict(checkpointing="full"),
    "every second block": dict(checkpointing="full", checkpointing_every=2),
    "selective": dict(checkpointing="selective"),
    "budget": dict(checkpointing_budget=0.4),
    "offload": dict(optimizer={"offload": True}, activation_offload=True, checkpointing="full"),
    "without the self-check": dict(self_check=False),
}


@pytest.fixture
def plain(make_recipe):
    return run(make_recipe(steps=4, clip=0.0, micro_batch_size=4))


@pytest.mark.parametrize("name", SAME)
def test_what_saves_memory_changes_no_bit(make_recipe, plain, name):
    saved = run(make_recipe(steps=4, clip=0.0, micro_batch_size=4, **SAME[name]))
    assert saved.losses == plain.losses


def test_updating_in_backward_changes_no_bit(make_recipe, plain):
    assert run(
        make_recipe(steps=4, clip=0.0, micro_batch_size=4, optimizer={"in_backward": True})
    ).losses == (plain.losses)


TRAINED = {
    "adamw, 8 bits": dict(optimizer={"state_bits": 8}),
    "adamw, 4 bits": dict(optimizer={"state_bits": 4}),
    "lion": dict(optimizer={"name": "lion", "learning_rate": 1e-3}),
    "lion, 8 bits": dict(optimizer={"name": "lion", "learning_rate": 1e-3, "state_bits": 8}),
    "muon": dict(optimizer={"name": "muon"}),
    "adafactor": dict(optimizer={"name": "adafactor"}),
    "stochastic rounding": dict(precision="bfloat16", optimizer={"masters": False}),
    "all of it": dict(
        precision="bfloat16",
        clip=0.0,
        micro_batch_size=4,
        checkpointing="selective",
        optimizer={"masters": False, "state_bits": 8, "in_backward": True},
    ),
    "lora": dict(adapt={"method": "lora", "rank": 4}),
    "rslora and lora+": dict(adapt={"method": "lora", "rank": 4, "rank_stabilized": True, "b_rate": 16}),
    "qlora": dict(adapt={"method": "lora", "rank": 4, "quantize": "nf4"}),
    "lora on int8": dict(adapt={"method": "lora", "rank": 4, "quantize": "int8"}, checkpointing="full"),
    "qlora in bfloat16": dict(
        adapt={"method": "lora", "rank": 4, "quantize": "nf4"}, precision="bfloat16", checkpointing="full"
    ),
    "qlora within a budget": dict(
        adapt={"method": "lora", "rank": 4, "quantize": "nf4"}, checkpointing_budget=0.4
    ),
    "dora": dict(adapt={"method": "dora", "rank": 4}),
    "prefix within a budget": dict(
        adapt={"method": "prefix", "tokens": 4}, optimizer={"learning_rate": 0.1}, checkpointing_budget=0.4
    ),
    "prompt": dict(adapt={"method": "prompt", "tokens": 4}, optimizer={"learning_rate": 0.3}),
    "prefix": dict(adapt={"method": "prefix", "tokens": 4}, optimizer={"learning_rate": 0.1}),
    "bottleneck": dict(adapt={"method": "bottleneck", "rank": 4}),
    "ia3": dict(adapt={"method": "ia3"}, optimizer={"learning_rate": 0.1}),
    "frozen embedding": dict(adapt={"freeze": ["embed.*"]}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_and_a_resumed_run_is_the_uninterrupted_one(make_recipe, name):
    """Stopped after step 3 and gone on with, the losses are those of six steps at a stretch, bit for bit."""
    recipe = make_recipe(steps=6, checkpoint_every=3, keep=9, **TRAINED[name])
    whole = run(recipe)
    assert min(whole.losses[3:]) < whole.losses[0]
    later = whole.run / "checkpoints" / "step-00000006"
    shutil.rmtree(later)
    (whole.run / "report.md").unlink()
    again = rw.resume(whole.run, progress=False)
    assert again.losses == whole.losses[3:]
    assert again.step == 6


@pytest.mark.parametrize("name", ["lora", "qlora", "dora", "prompt", "prefix", "bottleneck", "ia3"])
def test_a_run_is_a_source_that_computes_what_was_trained(make_recipe, name):
    """The last validation loss, measured by the trained model, is that of the run loaded anew.

    Adapters that were trained on 4-bit weights are merged into the 16-bit ones: those differ by the rounding.
    """
    result = run(make_recipe(steps=4, **TRAINED[name]))
    recipe = load_recipe(result.run / "recipe.yaml")
    held_out = prepare(recipe).validation
    loader = Loader(held_out, recipe.data.sequence_length, recipe.data.packing, 4, recipe.seed, 0)
    found = validation_loss(
        rw.load_model(result.run), loader, rows=64, micro_batch=2, chunk=64, device=torch.device("cpu")
    )
    assert found is not None
    assert found[0] == pytest.approx(result.validation_after, rel=0.02 if name == "qlora" else 1e-5)
    assert found[0] < 0.999 * result.validation_before


def test_the_self_check_is_said_and_recorded(make_recipe, capfd):
    result = rw.train(make_recipe(steps=1))
    assert "self-check: fused = reference, packed = alone" in capfd.readouterr().err
    records = [json.loads(x) for x in (result.run / "metrics-train.jsonl").read_text().splitlines()]
    (checked,) = [r for r in records if r["kind"] == "self_check"]
    assert checked["difference"] < checked["allowed"]


def test_bitfit_on_a_model_without_biases_is_refused_by_name(make_recipe):
    with pytest.raises(UserError, match="bias"):
        run(make_recipe(steps=1, adapt={"method": "bitfit"}))


def test_gradients_that_are_not_finite_in_backward_are_said_to_have_done_harm(make_recipe, monkeypatch):
    def broken(model, batch, chunk):
        loss = right(model, batch, chunk)
        return loss + (model.embed.weight.sum() * 0).sqrt()  # 0 with an infinite slope

    right = loop.loss_sum
    monkeypatch.setattr(loop, "loss_sum", broken)
    fields = dict(steps=1, clip=0.0, micro_batch_size=4, self_check=False)
    with pytest.raises(RopewalkError, match="some weights were updated"):
        run(make_recipe(**fields, optimizer={"in_backward": True}))
    with pytest.raises(RopewalkError, match="unharmed"):
        run(make_recipe(**fields))
