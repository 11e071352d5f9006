"""A run in several processes stops and goes on, there or in another number of them, and nothing is lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ropewalk as rw
from ropewalk.errors import RopewalkError, UserError


def until(run: Path, step: int, target: Path) -> Path:
    """The run as it was at the checkpoint of `step`."""
    shutil.copytree(run, target)
    (target / "report.md").unlink()
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return target


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (Path(run) / "metrics-train.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def model(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")


def test_a_run_goes_on_in_any_number_of_processes(make_recipe: Any, train_in: Any, tmp_path: Path) -> None:
    """In as many: the same bits. In others, more and fewer: the same training but for the order of sums."""
    recipe = make_recipe(steps=6, batch_size=4, micro_batch_size=1, checkpoint_every=3, keep=9)
    divided = recipe | {"parallel": {"shard": 2}}
    whole = Path(train_in(2, {"whole": ("train", [divided, [], False])})["whole"]["run"])
    copies = {name: until(whole, 3, tmp_path / name) for name in ("same", "fewer", "more")}
    two = train_in(2, {"same": ("resume", [str(copies["same"]), [], False])})
    assert two["same"]["steps"] == 6
    assert losses(copies["same"]) == losses(whole)
    wanted = model(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model(copies["same"]).items())
    rw.resume(copies["fewer"], ["parallel.shard=1"], progress=False)
    rw.resume(copies["more"], ["parallel.shard=4"], progress=False)  # starts them itself
    for name in ("fewer", "more"):
        assert losses(copies[name]) == pytest.approx(losses(whole), rel=1e-5)
        for key, tensor in model(copies[name]).items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-4)
    # and what one process began, two finish
    single = rw.train(recipe, progress=False)
    begun = until(single.run, 3, tmp_path / "begun")
    rw.resume(begun, ["parallel.shard=2"], progress=False)
    assert losses(begun) == pytest.approx(losses(single.run), rel=1e-5)
    with pytest.raises(UserError, match=r"train\.steps=9: a run goes on as it began"):
        rw.resume(begun, ["train.steps=9"])


TRAIN = "import sys, json, ropewalk as rw; print(rw.train(json.loads(sys.argv[1])).interrupted)"


def test_a_stop_signal_ends_all_processes_in_good_order(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=100000, batch_size=2, micro_batch_size=1, log_every=1) | {
        "parallel": {"shard": 2}
    }
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(recipe)], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while (
        not (found := list(Path(recipe["runs"]).glob("*/metrics-train.jsonl")))
        or len(losses(found[0].parent)) < 3
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.strip() == "True"
    (run,) = Path(recipe["runs"]).iterdir()
    done = len(losses(run))
    assert (run / "checkpoints" / f"step-{done:08d}" / "MANIFEST.json").is_file()


def test_what_fails_in_one_process_is_said_once(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(steps=2, batch_size=4, precision="float32", optimizer={"learning_rate": 1e30})
    with pytest.raises(RopewalkError, match="step 2: the loss is") as caught:
        rw.train(recipe | {"parallel": {"shard": 2}}, progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"train\.batch_size: 4 rows cannot be shared out among 3 processes"):
        rw.train(recipe | {"parallel": {"shard": 3}}, progress=False)


@pytest.mark.slow
def test_torchrun_starts_a_run_that_takes_all_its_processes(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=2, batch_size=4, micro_batch_size=None)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = Path(sys.executable).with_name("ropewalk")
    words = f"--standalone --nproc-per-node 2 --no-python {program} train {tmp_path / 'recipe.yaml'}"
    command = [sys.executable, "-m", "torch.distributed.run", *words.split()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    (run,) = Path(recipe["runs"]).iterdir()
    assert said.strip() == str(run)  # once, not by each
    assert "shard: 2" in (run / "recipe.yaml").read_text()
    refused = subprocess.run([*command[:-2], "run", command[-1]], capture_output=True, text=True, timeout=240)
    assert "call it without torchrun" in refused.stderr
