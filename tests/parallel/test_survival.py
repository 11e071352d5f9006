"""A run in several processes stops and goes on, there or in another number of them, and nothing is lost."""

import json
import os
import re
import signal
import socket
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


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (Path(run) / "metrics-train.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def model(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_divided_rows_goes_on_in_one_process_and_back(
    copy_until: Any, make_recipe: Any, train_in: Any, tmp_path: Path, tensor: int
) -> None:
    recipe = make_recipe(steps=6, batch_size=4, micro_batch_size=1, checkpoint_every=3, keep=9)
    divided = recipe | {"parallel": {"context": 2, "tensor": tensor, "context_exchange": "ring"}}
    whole = Path(train_in(2 * tensor, {"whole": ("train", [divided, [], False])})["whole"]["run"])
    same, one = copy_until(whole, 3, tmp_path / "same"), copy_until(whole, 3, tmp_path / "one")
    single = rw.train(recipe, progress=False).run
    two = copy_until(single, 3, tmp_path / "two")
    train_in(
        2 * tensor,
        {
            "same": ("resume", [str(same), [], False]),
            "two": ("resume", [str(two), ["parallel.context=2", f"parallel.tensor={tensor}"], False]),
        },
    )
    rw.resume(one, ["parallel.context=1", "parallel.tensor=1"], progress=False)
    assert losses(same) == losses(whole)
    for run in (one, two):
        assert losses(run) == pytest.approx(losses(single), rel=1e-5)
        for key, tensor in model(run).items():
            torch.testing.assert_close(tensor, model(single)[key], rtol=1e-3, atol=1e-4)


def test_a_pipeline_goes_on_in_one_process_and_back(
    copy_until: Any, make_recipe: Any, train_in: Any, tmp_path: Path
) -> None:
    """In as many: the same bits. In one, from one, and divided otherwise: the same training, answers too."""
    panel = {"prompts": ["The ropewalk is", "Many"], "max_new_tokens": 8}
    recipe = make_recipe(
        steps=6, batch_size=4, micro_batch_size=1, checkpoint_every=3, keep=9, evaluate=panel
    )
    divided = recipe | {"parallel": {"pipeline": 2}}
    low = ["train.precision=bfloat16", "train.steps=1", "train.self_check=false"]
    calls = {"whole": ("train", [divided, [], False]), "low": ("train", [divided, low, False])}
    runs = {name: Path(found["run"]) for name, found in train_in(2, calls).items()}
    whole = runs["whole"]
    copies = {name: copy_until(whole, 3, tmp_path / name) for name in ("same", "one", "shard")}
    single = rw.train(recipe, progress=False).run
    copies["two"] = copy_until(single, 3, tmp_path / "two")
    changes = {
        "same": [],
        "shard": ["parallel.pipeline=1", "parallel.shard=2"],
        "two": ["parallel.pipeline=2"],
    }
    train_in(2, {name: ("resume", [str(copies[name]), words, False]) for name, words in changes.items()})
    rw.resume(copies["one"], ["parallel.pipeline=1"], progress=False)
    assert losses(copies["same"]) == losses(whole)
    assert all(torch.equal(t, model(whole)[key]) for key, t in model(copies["same"]).items())
    answers = (single / "samples" / "step-00000006.jsonl").read_text()
    assert (whole / "samples" / "step-00000006.jsonl").read_text() == answers
    assert {t.dtype for t in model(runs["low"], 1).values()} == {torch.bfloat16}  # of all stages
    for run in (whole, copies["one"], copies["shard"], copies["two"]):
        assert losses(run) == pytest.approx(losses(single), rel=1e-5)
        assert model(run).keys() == model(single).keys()
        for key, tensor in model(run).items():
            torch.testing.assert_close(tensor, model(single)[key], rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_in_any_number_of_processes(
    copy_until: Any, make_recipe: Any, train_in: Any, tmp_path: Path
) -> None:
    """In as many: the same bits. In others, more and fewer: the same training but for the order of sums.

    Also where samples are the first thing that is to do; and of adapters on a base in 8 bits.
    """
    fields = {"steps": 6, "batch_size": 4, "micro_batch_size": 1, "checkpoint_every": 3, "keep": 9}
    panel = {"prompts": ["rope"], "max_new_tokens": 2}
    recipe = make_recipe(**fields, sample_every=3, evaluate=panel)
    divided = recipe | {"parallel": {"shard": 2}}
    adapters = divided | {"adapt": {"method": "lora", "quantize": "int8"}}
    calls = {"whole": ("train", [divided, [], False]), "int8": ("train", [adapters, [], False])}
    whole, int8 = (Path(found["run"]) for found in train_in(2, calls).values())
    copies = {name: copy_until(whole, 3, tmp_path / name) for name in ("same", "fewer", "more")}
    rw.resume(copied := copy_until(int8, 3, tmp_path / "int8"), ["parallel.shard=1"], progress=False)
    assert losses(copied) == pytest.approx(losses(int8), rel=1e-5)
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
    begun = copy_until(single.run, 3, tmp_path / "begun")
    rw.resume(begun, ["parallel.shard=2"], progress=False)
    assert losses(begun) == pytest.approx(losses(single.run), rel=1e-5)
    with pytest.raises(UserError, match=r"train\.steps=9: a run goes on as it began"):
        rw.resume(begun, ["train.steps=9"])


@pytest.mark.slow
def test_two_four_one_and_three_processes_train_what_one_trains(
    copy_until: Any, make_recipe: Any, tmp_path: Path
) -> None:
    """A chain of resumes, each in another number of processes: the same tokens in every step, and losses."""
    recipe = make_recipe(steps=8, batch_size=12, micro_batch_size=1, checkpoint_every=2, keep=9, clip=0.0)
    alone = rw.train(recipe, progress=False)
    run = rw.train(recipe | {"parallel": {"shard": 2}}, progress=False).run
    for step, shards in ((2, 4), (4, 1), (6, 3)):
        run = copy_until(run, step, tmp_path / f"in-{shards}")
        rw.resume(run, [f"parallel.shard={shards}"], progress=False)
    assert tokens(run) == tokens(alone.run)
    assert losses(run) == pytest.approx(losses(alone.run), rel=1e-5)
    wanted = model(alone.run, 8)
    for name, tensor in model(run, 8).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)


def tokens(run: Path) -> list[tuple[int, int, int]]:
    records = [json.loads(line) for line in (Path(run) / "metrics-train.jsonl").read_text().splitlines()]
    kinds = ("tokens", "scored_tokens", "tokens_seen")
    return [tuple(record[kind] for kind in kinds) for record in records if record["kind"] == "train"]


TRAIN = "import sys, json, ropewalk as rw; print(rw.train(json.loads(sys.argv[1])).interrupted)"


def test_a_stop_signal_ends_all_processes_in_good_order(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=100000, batch_size=2, micro_batch_size=1, log_every=1) | {
        "parallel": {"shard": 2}
    }
    process = start(recipe)
    wait_for_step(recipe, 3)
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


def workers(parent: int) -> list[int]:
    """The processes that train, first to last."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(pid) for pid in found if b"ropewalk.train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def start(recipe: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, json.dumps(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(recipe: dict[str, Any], step: int) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for file in Path(recipe["runs"]).glob("*/metrics-train.jsonl"):
            if len(losses(file.parent)) >= step:
                return file.parent
        time.sleep(0.05)
    raise AssertionError("no such step in two minutes")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_and_a_stopped_process_cost_the_steps_since_the_last_checkpoint(
    make_recipe: Any, train_in: Any, rank: int
) -> None:
    """One is killed and, when the run goes on, the other one stopped: each is named, and nothing is lost."""
    recipe = make_recipe(steps=30, batch_size=2, micro_batch_size=1, checkpoint_every=5, keep=99)
    recipe |= {"parallel": {"shard": 2, "hang_seconds": 2}}
    process = start(recipe)
    run = wait_for_step(recipe, 12)
    os.kill(workers(process.pid)[rank], signal.SIGKILL)
    wait_for_step(recipe, 22)
    os.kill(workers(process.pid)[1 - rank], signal.SIGSTOP)
    said, warned = process.communicate(timeout=240)
    assert said.strip() == "False", warned
    assert "a process of the run ended by SIGKILL after step" in warned
    assert "starting again (1 of 3)" in warned
    assert re.search(
        rf"step \d+ hangs: process {1 - rank} on \S+ never came to \w+ \(.*\), where 1 wait;", warned
    )
    assert re.search(r"it has not answered for \d+ s, last seen in step \d+, ", warned)
    assert "starting again (2 of 3)" in warned
    assert "Traceback" not in warned
    assert [path for path in Path(recipe["runs"]).iterdir()] == [run]
    whole = Path(train_in(2, {"whole": ("train", [recipe, [], False])})["whole"]["run"])
    assert losses(run) == losses(whole)
    wanted = model(whole, 30)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model(run, 30).items())


def test_a_run_that_dies_twice_at_one_step_is_not_started_for_ever(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=100000, batch_size=2, micro_batch_size=1) | {"parallel": {"shard": 2}}
    process = start(recipe)
    run = wait_for_step(recipe, 2)
    killed: set[int] = set()
    while process.poll() is None:  # before the first step after each start: it never gets further
        for pid in workers(process.pid):
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.01)
    _, warned = process.communicate()
    assert process.returncode
    assert "for the second time there; go on with: ropewalk resume" in warned
    assert str(run) in warned


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
    refused = subprocess.run([*command[:-2], "run", command[-1]], capture_output=True, text=True, timeout=120)
    assert "call it without torchrun" in refused.stderr


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=30, batch_size=2, micro_batch_size=None, checkpoint_every=5, keep=99)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = Path(sys.executable).with_name("ropewalk")
    words = f"--standalone --nproc-per-node 2 --max-restarts 2 --no-python {program} train".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, str(tmp_path / "recipe.yaml")],
        # by torch's default a third of the restarts fail with Gloo
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = wait_for_step(recipe, 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, warned = process.communicate(timeout=120)
    assert process.returncode == 0, warned
    assert said.strip() == str(run)
    assert [path for path in Path(recipe["runs"]).iterdir()] == [run]
    assert len(losses(run)) == 30
    assert (run / "report.md").exists()


@pytest.mark.slow
def test_an_elastic_job_goes_on_with_the_processes_that_are_left(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(steps=30, batch_size=2, micro_batch_size=None, checkpoint_every=5, keep=99)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = Path(sys.executable).with_name("ropewalk")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"--nnodes 1:2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id e{port}"
    words += f" --rdzv-endpoint 127.0.0.1:{port}"
    words += f" --max-restarts 3 --no-python {program} train {tmp_path / 'recipe.yaml'}"
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words.split()],
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"node-{i}.log").open("w"),
            start_new_session=True,
        )
        for i in range(2)
        if i == 0 or not time.sleep(3)  # the first one holds the rendezvous
    ]
    run = wait_for_step(recipe, 12)
    assert "shard: 2" in (run / "recipe.yaml").read_text()
    for pid in Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    nodes[1].kill()
    assert nodes[0].wait(240) == 0, (tmp_path / "node-0.log").read_text()
    nodes[1].wait()
    assert [path for path in Path(recipe["runs"]).iterdir()] == [run]
    alone = rw.train(recipe | {"runs": str(tmp_path / "alone")}, progress=False)
    assert losses(run) == pytest.approx(losses(alone.run), rel=1e-4)
