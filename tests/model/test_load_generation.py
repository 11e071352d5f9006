"""What ends a sequence is read from generation_config.json, which may know more than config.json."""

import json
import shutil

import pytest

from ropewalk.errors import UserError
from ropewalk.model import load_model


@pytest.fixture
def folder(tiny_llama_dir, tmp_path):
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def test_generation_config_says_what_ends_a_sequence(folder):
    assert load_model(folder).config.eos_token_ids == (2,)
    for eos, expected in (([2, 0], (2, 0)), (1, (1,)), (None, (2,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_model(folder).config.eos_token_ids == expected


@pytest.mark.parametrize("eos", ["x", [2, 384], [-1], {"a": 1}])
def test_ids_that_are_none_are_refused_by_file(folder, eos):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        load_model(folder)
