"""ropewalk runs verify: every file of every checkpoint, or the one that is damaged by name."""

from typing import Any

import pytest

import ropewalk as rw
from ropewalk.cli import main


def test_verify_names_the_damaged_file(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = rw.train(make_recipe(steps=2, checkpoint_every=1), progress=False).run
    capsys.readouterr()
    assert main(["runs", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step-00000001  whole\nstep-00000002  whole\n"
    file = run / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert main(["runs", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"step-00000002  {file}: does not match its hash" in said
    assert "step-00000001  whole" in said
