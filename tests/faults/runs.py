"""Starts runs quickly: every process is a fork of this one, which has imported all and computed nothing.

What starts, watches and ends the processes of a run is `ropewalk.parallel.launch`, as always.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

# so that no run has to
import pyarrow.dataset  # noqa: F401
import sympy  # noqa: F401
import tokenizers
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import transformers

import ropewalk as rw
from ropewalk.errors import RopewalkError, UserError
from ropewalk.parallel import launch
from ropewalk.train import worker

PATIENCE = 300.0
"""Seconds for a run of a few steps, on a machine that does other things too."""
GRACE = 3.0
"""Instead of the 10 seconds that processes have to end when one has failed."""
LAYOUTS: dict[str, dict[str, int]] = {
    "shard=2": {"shard": 2},
    "replicate=2": {"shard": 1, "replicate": 2},
    "tensor=2": {"shard": 1, "tensor": 2},
    "shard=4": {"shard": 4},
    "replicate=2,shard=2": {"shard": 2, "replicate": 2},
    "tensor=2,shard=2": {"shard": 2, "tensor": 2},
    "one": {"shard": 1},
}
Plant = Callable[[], None]


def processes(layout: str) -> int:
    fields = LAYOUTS[layout]
    return fields.get("shard", 1) * fields.get("replicate", 1) * fields.get("tensor", 1)


def overrides(layout: str) -> list[str]:
    """For `resume`: all three, since the run had others."""
    fields = {"shard": 1, "replicate": 1, "tensor": 1} | LAYOUTS[layout]
    return [f"parallel.{name}={value}" for name, value in fields.items()]


class Forked:
    """What `launch` needs of subprocess.Popen, for a process of a run.

    None does anything before all are forked: the thread of the store in this process would look up the name
    of one that has come there, and the next one be forked with the resolver's lock held, for ever.
    """

    gate: tuple[int, int] | None = None
    """a pipe that is closed when all are forked"""

    def __init__(self, command: list[str], env: Mapping[str, str], start_new_session: bool) -> None:
        assert command[1:3] == ["-m", "ropewalk.train.worker"]
        assert start_new_session
        self.returncode: int | None = None
        read, write = type(self).gate = type(self).gate or os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 99
            try:
                os.close(write)
                os.read(read, 1)
                os.setsid()
                for number in launch.FORWARDED:
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(env)
                sys.argv = command[2:]
                self.plant()
                status = worker.main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                time.sleep(0.05)  # an interpreter takes that long to end
                os._exit(status)

    plant: Plant = staticmethod(lambda: None)

    def poll(self) -> int | None:
        """`launch` asks when it has started all."""
        for end in type(self).gate or ():
            os.close(end)
        type(self).gate = None
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def call(name: str, arguments: list[Any], log: Path, plant: Plant = lambda: None) -> int | None:
    """`ropewalk.NAME(*arguments)` in a process of its own: its exit status as of the command line.

    `plant` is called in each process of the run. All that is said is added to `log`. None: it did not end.
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            forks = SimpleNamespace(Popen=type("Planted", (Forked,), {"plant": staticmethod(plant)}))
            with mock.patch.object(launch, "subprocess", forks), mock.patch.object(launch, "GRACE", GRACE):
                getattr(rw, name)(*arguments)
            status = 0
        except (UserError, RopewalkError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2 if isinstance(error, UserError) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in [pid, *map(int, children)]:
        os.kill(each, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


WORDS = (
    "rope walk fibre strand twist long building loose strong spin lay yarn hemp tar sail mast deck".split()
)


def make_files(folder: Path) -> None:
    """A tokenizer and documents."""
    names = ["<pad>", "<s>", "</s>", *WORDS]
    names += [f"<{i}>" for i in range(64 - len(names))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.save_pretrained(folder / "tokenizer")
    random = Random(7)
    texts = [" ".join(random.choices(WORDS, k=random.choice((5, 13, 30)))) for _ in range(80)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def recipe(folder: Path, runs: Path, layout: str, hang_seconds: float | None, **train: Any) -> dict[str, Any]:
    """A model of two small blocks, from scratch, under `runs`; files of `make_files` are in `folder`."""
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return {
        "name": "fault",
        "seed": 3,
        "runs": str(runs),
        "model": {"config": config, "tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(folder / "corpus.jsonl")}],
            "validation_fraction": 0,
            "sequence_length": 32,
            "directory": str(folder / "prepared"),
            "workers": 1,
        },
        "train": {
            "micro_batch_size": 1,
            "threads": 1,
            "device": "cpu",
            "precision": "float32",
            "self_check": False,
            "log_every": 1,
            "keep": 99,
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
            **train,
        },
        "parallel": {**LAYOUTS[layout], "hang_seconds": hang_seconds},
    }
