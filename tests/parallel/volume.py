"""Counts what collectives send in a training step: `python volume.py JOBS.json` with torchrun's variables."""

import json
import os
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ropewalk.data import prepare
from ropewalk.parallel import World
from ropewalk.recipe import load_recipe, resolve
from ropewalk.train.entry import layout_of
from ropewalk.train.job import open_job
from ropewalk.train.loop import ahead, train_step

SMALL = 4096
"""Bytes: what is less is numbers that the processes tell each other, not tensors of the model."""


class Sent(TorchDispatchMode):
    """Bytes that this process sends, by a ring's count, by kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("c10d::")
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            output, given = args[:2]
            whole = max(output.nbytes, given.nbytes)
            parts = whole // min(output.nbytes, given.nbytes)
            self.add("all-gather" if name == "_allgather_base_" else "reduce-scatter", whole, parts, 1)
        elif name == "allreduce_":
            for tensor in args[0]:
                self.add("all-reduce", tensor.nbytes, dist.get_world_size(), 2)
        elif name == "send":
            for tensor in args[0]:
                self.bytes["send"] += tensor.nbytes * (tensor.nbytes > SMALL)
        return function(*args, **(kwargs or {}))

    def add(self, kind: str, whole: int, parts: int, times: int) -> None:
        if whole > SMALL:
            self.bytes[kind] += times * whole * (parts - 1) // parts


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, recipe in jobs.items():
        checked = resolve(load_recipe(recipe)).recipe
        world = World.join("cpu", layout_of(checked))
        job = open_job(checked, prepare(checked).train, None, world=world)
        with closing(ahead(job)) as batches:
            for job.step in (1, 2):
                with Sent() as sent:
                    train_step(job, batches)
        weights = sum(p.numel() * p.element_size() for p in job.built.model.parameters())
        found[name] = {**sent.bytes, "weights": weights, "sent": world.everywhere([sent.bytes["send"]])[0]}
        torch.manual_seed(0)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).with_suffix(".result").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
