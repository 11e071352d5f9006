"""signals: the first one asks, a second SIGINT aborts, and afterwards all is as before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ropewalk.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
        assert stop.preempted == number.name.startswith("SIGUSR")
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop


def test_a_second_sigterm_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == "SIGTERM"


ROPEWALK = Path(sys.executable).with_name("ropewalk")


@pytest.mark.parametrize(
    ("number", "processes", "status"),
    [
        (signal.SIGUSR2, 1, 75),
        (signal.SIGUSR1, 2, 75),
        pytest.param(signal.SIGTERM, 1, 130, marks=pytest.mark.slow),
    ],
)
def test_the_exit_status_says_whether_to_start_again(
    make_recipe: Any, tmp_path: Path, number: signal.Signals, processes: int, status: int
) -> None:
    """75 (EX_TEMPFAIL) after what schedulers send before they take a machine; the step's work is saved."""
    recipe = make_recipe(steps=100_000, batch_size=2, micro_batch_size=1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"parallel": {"shard": processes}}))
    process = subprocess.Popen(
        [ROPEWALK, "train", tmp_path / "recipe.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(file.stat().st_size > 1500 for file in Path(recipe["runs"]).glob("*/metrics-train.jsonl")):
            break
        time.sleep(0.05)
    process.send_signal(number)
    said, warned = process.communicate(timeout=120)
    assert process.returncode == status, warned
    (run,) = Path(recipe["runs"]).iterdir()
    assert said.strip() == str(run)
    assert f"stopped by {number.name} after step" in warned
    (checkpoint,) = (run / "checkpoints").iterdir()
    done = [json.loads(line)["step"] for line in (run / "metrics-train.jsonl").open()]
    assert checkpoint.name == f"step-{max(done):08d}"
