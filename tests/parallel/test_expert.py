"""Divided experts: what is refused, checkpoints in and out of a layout, and that replicas are compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.layout import REST, Layout
from ropewalk.model import config_from_fields
from ropewalk.parallel import World, expert_refusal, refusal, replicas

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}


@pytest.fixture
def mixture(make_recipe: Any) -> Any:
    """`mixture(layout, **train fields)`: a recipe of a small mixtral from scratch."""

    def make(layout: dict[str, Any], **train: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = make_recipe(micro_batch_size=1, **train)
        scratch = {"config": MIXTRAL, "tokenizer": recipe["model"]["source"]}
        return recipe | {"model": scratch, "parallel": layout}

    return make


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (Path(run) / "metrics-train.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def samples(run: Path) -> list[str]:
    return [file.read_text() for file in sorted((Path(run) / "samples").iterdir())]


def model(run: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / "step-00000006" / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("processes", "more", "other"),
    [
        (2, {}, ["parallel.shard=2"]),
        pytest.param(4, {"pipeline": 2}, ["parallel.shard=4"], marks=pytest.mark.slow),
    ],
)
def test_a_run_with_divided_experts_goes_on_in_other_layouts_and_back(
    processes: int, more: dict[str, Any], other: list[str], mixture: Any, train_in: Any, until: Any
) -> None:
    """In the same layout the same bits; in others the same training, and transformers' names in model/."""
    fields: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, "keep": 9, "clip": 0.1, "verify_every": 5}
    fields |= {"sample_every": 3, "evaluate": {"prompts": ["rope", "walk"], "max_new_tokens": 3}}
    divided, alone = {"replicate": 2, "shard": 1, "expert": 2} | more, {"shard": 1}
    whole = train_in(processes, {"whole": ("train", [mixture(divided, **fields), [], False])})["whole"]["run"]
    single = rw.train(mixture(alone, **fields), progress=False).run
    same, one, two = until(whole, "same"), until(whole, "one"), until(single, "two")
    train_in(
        processes,
        {
            "same": ("resume", [str(same), [], False]),
            "two": ("resume", [str(two), [*other, "parallel.expert=2"], False]),
        },
    )
    ones = [f"parallel.{degree}=1" for degree in divided]
    rw.resume(one, ones, progress=False)
    assert losses(same) == losses(whole)
    assert all(torch.equal(tensor, model(whole)[name]) for name, tensor in model(same).items())
    for run in (whole, one, two):
        assert losses(run) == pytest.approx(losses(single), rel=1e-5)
        assert model(run).keys() == model(single).keys()
        assert samples(run) == samples(single)
        for name, tensor in model(run).items():
            torch.testing.assert_close(tensor, model(single)[name], rtol=1e-3, atol=1e-4)
    from transformers import AutoModelForCausalLM

    _, said = AutoModelForCausalLM.from_pretrained(
        Path(whole) / "checkpoints" / "step-00000006" / "model", output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]


def test_parity_checks_divided_experts(mixture: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(mixture({})))
    assert main(["parity", str(recipe), "parallel.shard=2", "parallel.expert=2"]) == 0
    assert capsys.readouterr().out.startswith("shard 2 x expert 2 trains what one process trains")


@pytest.mark.parametrize(
    ("layout", "processes", "parts", "copies"),
    [
        (Layout(shard=4, expert=2), 4, 2, 1),
        (Layout(replicate=2, shard=2, expert=2), 4, 1, 2),
        (Layout(replicate=2, shard=2, expert=4), 4, 1, 1),
        (Layout(replicate=4, shard=1, expert=2), 4, 1, 2),
        (Layout(shard=2, context=2, tensor=2, expert=4), 8, 2, 1),
        (Layout(replicate=2, shard=4, expert=2), 8, 2, 2),
        (Layout(shard=REST, expert=REST), 6, 1, 1),
        (Layout(shard=4), 4, 4, 1),
        (Layout(pipeline=2, shard=4, expert=2), 8, 2, 1),
        (Layout(pipeline=2, replicate=2, shard=2, expert=2), 8, 1, 2),
        (Layout(pipeline=3, shard=REST, expert=REST), 12, 1, 1),
    ],
)
def test_experts_copies_and_parts_make_the_processes(
    layout: Layout, processes: int, parts: int, copies: int
) -> None:
    found = layout.over(processes)
    assert (found.expert_parts, found.expert_copies) == (parts, copies)
    assert found.pipeline * found.expert * found.expert_parts * found.expert_copies == processes


def test_replicas_of_an_expert_are_those_that_have_the_same_part_of_it() -> None:
    """Against the mesh that the processes are laid on: copies, parts and experts, neighbours last."""
    expert, dense = "blocks.0.mlp.experts.3.up_proj.weight", "blocks.0.mlp.router.weight"
    for layout in (
        Layout(replicate=4, shard=2, expert=4),
        Layout(replicate=2, shard=4, expert=2),
        Layout(replicate=2, shard=2, tensor=2, expert=4),
    ):
        experts: Any = object()  # there are some
        world = World(size=8, layout=layout, experts=experts)
        mesh = torch.arange(8).view(layout.expert_copies, layout.expert_parts * layout.expert)
        assert sorted(map(list, replicas(expert, world))) == sorted(mesh.t().tolist())
        mesh = torch.arange(8).view(layout.replicate, -1)
        assert sorted(map(list, replicas(dense, world))) == sorted(mesh.t().tolist())


@pytest.mark.parametrize(
    ("layout", "processes", "said"),
    [
        (Layout(expert=2), 1, "set it to 1, or parallel.shard to a multiple of 2"),
        (Layout(expert=2), 3, "set it to 3, or parallel.shard to a multiple of 2"),
        (Layout(expert=6), 4, "set it to 4"),
        (Layout(replicate=2, expert=3), 12, None),
        (Layout(replicate=3, shard=2, expert=3), 6, "set it to 2"),
        (Layout(pipeline=2, shard=2, expert=4), 4, "set it to 2"),  # the other two have other blocks
    ],
)
def test_a_degree_that_the_others_leave_no_place_for_is_refused(
    layout: Layout, processes: int, said: str | None
) -> None:
    if said is None:
        assert layout.over(processes).expert == layout.expert
        return
    with pytest.raises(UserError, match=rf"parallel\.expert: it takes no processes of its own.*{said}"):
        layout.over(processes)


def test_models_that_cannot_be_divided_are_refused_with_the_nearest_degree() -> None:
    mixtral = config_from_fields(MIXTRAL)
    experts = ("num_local_experts", "num_experts_per_tok")
    fields = {name: value for name, value in MIXTRAL.items() if name not in experts}
    dense = config_from_fields(fields | {"model_type": "llama"})
    assert expert_refusal(mixtral, Layout(shard=6, expert=6)) is None
    assert expert_refusal(dense, Layout(shard=2)) is None
    assert expert_refusal(dense, Layout(shard=2, expert=2)) == (
        "this llama model has no experts; set parallel.expert: 1"
    )
    why = "4 does not divide 6 experts; set parallel.expert: 2"  # 3 is as near, but does not divide 4 shards
    assert expert_refusal(mixtral, Layout(shard=4, expert=4)) == why
    assert refusal(mixtral, 2) is None  # of a mixture only attention and vocabulary are sliced
    assert "num_key_value_heads 2" in str(refusal(mixtral, 4))


def test_refusals_come_before_a_process_is_started(mixture: Any, make_recipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("ropewalk.train.together.launch", None)
    with pytest.raises(UserError, match=r"parallel\.expert: 4 does not divide 6 experts"):
        rw.train(mixture({"shard": 4, "expert": 4}), progress=False)
    with pytest.raises(UserError, match=r"parallel\.expert: .* no experts; set parallel.expert: 1"):
        rw.train(make_recipe() | {"parallel": {"shard": 2, "expert": 2}}, progress=False)
    with pytest.raises(UserError, match=r"train\.compile: not with parallel\.expert"):
        rw.train(mixture({"shard": 2, "expert": 2}, compile=True), progress=False)
