"""Trains recipes in some processes, of which the last has a fault: `python faulty_worker.py JOBS.json`."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ropewalk.data import Loader
from ropewalk.errors import RopewalkError
from ropewalk.model import transformer
from ropewalk.parallel import local
from ropewalk.train import entry, loop, pipelined


@contextmanager
def slow_data() -> Iterator[None]:
    known = Loader.batch

    def batch(*arguments: Any) -> Any:
        time.sleep(0.2)
        return known(*arguments)

    with mock.patch.object(Loader, "batch", batch):
        yield


@contextmanager
def slow_blocks() -> Iterator[None]:
    known = transformer.Block.forward

    def forward(*arguments: Any) -> Any:
        time.sleep(0.05)
        return known(*arguments)

    with mock.patch.object(transformer.Block, "forward", forward):
        yield


@contextmanager
def wrong_loss(call: int, factor: float) -> Iterator[None]:
    """That of one forward pass in training, counted from 1."""
    calls = 0

    def wrong(known: Any) -> Any:
        def loss_sum(*arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return known(*arguments) * (factor if calls == call else 1.0)

        return loss_sum

    with (
        mock.patch.object(loop, "loss_sum", wrong(loop.loss_sum)),
        mock.patch.object(pipelined, "head_loss_sum", wrong(pipelined.head_loss_sum)),
    ):
        yield


@contextmanager
def flipped_bit(step: int, name: str = "blocks.1.mlp.down_proj.weight") -> Iterator[None]:
    """The lowest bit of one number of one weight, before a step."""
    known = loop.train_step

    def train_step(job: Any, batches: Any) -> Any:
        if job.step == step:
            weight = job.optimizer.parameters[name]
            local(weight).view(-1)[7:8].view(torch.int32).bitwise_xor_(1)
        return known(job, batches)

    with mock.patch.object(loop, "train_step", train_step):
        yield


FAULTS: dict[str, Any] = {
    "slow data": slow_data,
    "slow blocks": slow_blocks,
    "nan": lambda: wrong_loss(3, math.nan),
    "other loss": lambda: wrong_loss(3, 1 + 1e-6),
    "flipped bit": lambda: flipped_bit(3),
    "flipped bit of the head": lambda: flipped_bit(3, "embed.weight"),
}

if __name__ == "__main__":
    rank, path = int(os.environ["RANK"]), Path(sys.argv[1])
    for name, (fault, recipe) in json.loads(path.read_text()).items():
        with FAULTS[fault]() if rank == int(os.environ["WORLD_SIZE"]) - 1 else mock.MagicMock():
            try:
                result = asdict(entry.train(recipe, [], False))
            except RopewalkError as error:
                result = {"error": str(error)}
        if rank == 0:
            path.with_name(f"{name}.result").write_text(json.dumps(result, default=str))
