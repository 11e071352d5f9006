"""`ropewalk parity` finds that a layout trains what one process trains, and where it does not."""

import json
from dataclasses import asdict

import pytest

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.layout import DEGREES
from ropewalk.parallel.launch import launch
from ropewalk.recipe import load_recipe, resolve
from ropewalk.train import layout_parity
from ropewalk.train.build import config_of

FAULTY = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from ropewalk.parallel import tensor
from ropewalk.train import parity_steps

right, calls = tensor._Exchange.leave, []

def wrong(self, *arguments):
    calls.append(1)
    return right(self, *arguments) * (1.01 if len(calls) % 4 == 0 else 1.0)  # the second MLP of two blocks

tensor._Exchange.leave = wrong
steps = parity_steps(json.loads(Path(sys.argv[1]).read_text()))
if os.environ["RANK"] == "0":
    Path(sys.argv[1]).with_suffix(".result").write_text(json.dumps(asdict(steps)))
"""


@pytest.mark.parametrize("degree", ["tensor", "context", "pipeline"])
def test_a_right_layout_is_found_to_be_right(make_recipe, capsys, tmp_path, degree):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(steps=3, checkpointing="full", precision="bfloat16")))
    assert main(["parity", str(recipe), f"parallel.{degree}=2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{degree} 2 trains what one process trains: losses differ by")
    assert not list(tmp_path.glob("runs/*"))  # no run is left behind


def test_the_first_part_that_differs_is_named(make_recipe, tmp_path):
    resolved = resolve(load_recipe(make_recipe(), ["parallel.tensor=2"])).recipe
    config = layout_parity.shallow(config_of(resolved))
    small = layout_parity.reduced(resolved, config, tmp_path)
    whole = small.parallel.model_copy(update=dict.fromkeys(DEGREES, 1))
    one = small.model_copy(update={"parallel": whole})
    alone = layout_parity.parity_steps(one.model_dump(mode="json"))
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "job.json").write_text(json.dumps(small.model_dump(mode="json")))
    assert launch([str(tmp_path / "faulty.py"), str(tmp_path / "job.json")], 2) == 0
    steps = layout_parity.Steps(**json.loads((tmp_path / "job.result").read_text()))
    found = layout_parity.compared("tensor 2", 2, alone, steps)
    assert not found.same
    assert found.first_different == "the values of blocks.1.mlp"
    assert "it begins in the values of blocks.1.mlp" in str(found)
    assert layout_parity.compared("itself", 2, alone, layout_parity.Steps(**asdict(alone))).same


def test_all_kinds_of_blocks_are_in_the_shallow_copy(make_recipe):
    config = config_of(resolve(load_recipe(make_recipe())).recipe)
    kinds = ("sliding_attention",) * 5 + ("full_attention",)
    mixed = layout_parity.replace(config, num_hidden_layers=12, layer_types=kinds * 2, sliding_window=8)
    assert layout_parity.shallow(mixed).layer_types == kinds
    assert layout_parity.shallow(layout_parity.replace(config, num_hidden_layers=12)).num_hidden_layers == 2


def test_one_process_has_nothing_to_be_compared_with(make_recipe):
    with pytest.raises(UserError, match=r"parallel\.tensor=2"):
        rw.parity(make_recipe())


def test_degrees_that_do_not_fit_are_refused_by_name_with_the_nearest_that_does(make_recipe):
    for degree, fits in ((3, "num_attention_heads 4"), (8, "set parallel.tensor: 2")):
        recipe = make_recipe()
        recipe["parallel"] = {"tensor": degree}
        recipe["data"]["sequence_length"] = 48
        with pytest.raises(UserError, match=fits):
            rw.train(recipe, progress=False)
