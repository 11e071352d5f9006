"""train.verify_every: nothing changes where all is well, and one flipped bit stops the run."""

import math
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.errors import RopewalkError, UserError
from ropewalk.train import loop
from ropewalk.train.verify import check_sums

Make = Callable[..., dict[str, Any]]
Trace = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_any_flipped_bit_changes_the_check_sum(dtype: torch.dtype) -> None:
    chance = random.Random(0)
    tensor = (torch.randn(37, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    before = check_sums({"a": tensor, "b": tensor})
    assert before["a"] == before["b"]
    raw = tensor.view(-1).view(torch.uint8)
    for _ in range(50):
        place, bit = chance.randrange(len(raw)), 1 << chance.randrange(8)
        raw[place] ^= bit
        assert check_sums({"a": tensor})["a"] != before["a"]
        raw[place] ^= bit
    assert check_sums({"a": tensor})["a"] == before["a"]
    assert check_sums({"a": torch.cat([tensor.view(-1)[:1], tensor.view(-1)])[1:]})["a"] == before["a"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_verified_run_is_the_same_run(
    make_recipe: Make, trace: Trace, tmp_path: Path, precision: str
) -> None:
    """Bit for bit, dropout included."""
    fields = {"precision": precision, "adapt": {"method": "lora", "rank": 4, "dropout": 0.2}}
    plain = rw.train(make_recipe(**fields), progress=False)
    recipe = make_recipe(verify_every=2, **fields) | {"runs": str(tmp_path / "verified")}
    verified = rw.train(recipe, progress=False)
    assert trace(verified.run) == trace(plain.run)
    left, right = (
        load_file(result.checkpoint / "state" / "tensors.safetensors")
        for result in (plain, verified)
        if result.checkpoint is not None
    )
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("call", [3, 4, 5, 6])
def test_a_wrong_loss_in_either_pass_stops_the_run(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Calls 1 and 2 are of step 1; 3 to 6 are the two micro-batches of step 2, twice."""
    sound, calls = loop.loss_sum, 0

    def wrong(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return sound(*arguments) * (1 + 1e-6 if calls == call else 1.0)

    monkeypatch.setattr(loop, "loss_sum", wrong)
    host = socket.gethostname()
    with pytest.raises(RopewalkError, match=f"step 2: process 0 on {host} computed another loss"):
        rw.train(make_recipe(verify_every=2), progress=False)


def test_one_bit_of_one_gradient_stops_the_run(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, calls, name = loop.backward, 0, "blocks.0.mlp.up_proj.weight"

    def wrong(job: Any, part: Any, scored: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = sound(job, part, scored)
        if calls == 6:
            job.optimizer.gradients()[name].view(-1)[11:12].view(torch.int32).bitwise_xor_(1)
        return loss

    monkeypatch.setattr(loop, "backward", wrong)
    with pytest.raises(RopewalkError, match=f"step 2: .* computed another gradient of {name}"):
        rw.train(make_recipe(verify_every=2), progress=False)


def test_a_computation_that_never_repeats_itself_is_not_called_damaged(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, chance = loop.loss_sum, random.Random(0)
    monkeypatch.setattr(loop, "loss_sum", lambda *a: sound(*a) * math.exp(chance.random() / 1e5))
    with pytest.raises(RopewalkError, match=r"step 3: .* with three results.*set train\.verify_every: 0"):
        rw.train(make_recipe(verify_every=3), progress=False)


def test_updates_in_backward_cannot_be_verified(make_recipe: Make) -> None:
    recipe = make_recipe(micro_batch_size=4, clip=0, optimizer={"in_backward": True}, verify_every=2)
    with pytest.raises(UserError, match=r"train\.verify_every: the weights are updated in the first"):
        rw.train(recipe, progress=False)
