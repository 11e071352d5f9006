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
from ropewalk.model.moe import MixtureOfExperts
from ropewalk.parallel import World
from ropewalk.recipe import load_recipe, resolve
from ropewalk.train.entry import layout_of
from ropewalk.train.job import Job, open_job
from ropewalk.train.loop import ahead, train_step

SMALL = 4096
"""Bytes: what is less is numbers that the processes tell each other, not tensors of the model."""


class Sent(TorchDispatchMode):
    """Bytes that this process sends, by a ring's count, by kind of operation."""

    KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "sent")

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
                self.add("all-reduce", tensor.nbytes, dist.ProcessGroup.unbox(args[1]).size(), 2)
        elif name == "send":
            for tensor in args[0]:
                self.bytes["sent"] += tensor.nbytes * (tensor.nbytes > SMALL)
        elif name == "alltoall_base_" and args[1].nbytes > SMALL:
            _, given, boxed, _, sent = args[:5]
            group = dist.ProcessGroup.unbox(boxed)
            self.bytes["rows"] += given.nbytes
            own = sent[group.rank()] * given[0].nbytes if sent else given.nbytes // group.size()
            self.bytes["all-to-all"] += given.nbytes - own
        return function(*args, **(kwargs or {}))

    def add(self, kind: str, whole: int, parts: int, times: int) -> None:
        if whole > SMALL:
            self.bytes[kind] += times * whole * (parts - 1) // parts


class Routed:
    """How many experts were chosen for this process's tokens, in all and of those that others have."""

    def __init__(self, job: Job) -> None:
        self.all = self.elsewhere = 0
        self._degree, self._index = job.world.layout.expert, job.world.index("expert")
        for module in job.built.model.modules():
            if isinstance(module, MixtureOfExperts) and self._degree > 1:
                module.router.register_forward_hook(self._count(module.top_k))

    def _count(self, top_k: int) -> Any:
        def count(router: torch.nn.Linear, _: Any, output: torch.Tensor) -> None:
            group = output.topk(top_k, dim=-1).indices // (output.shape[-1] // self._degree)
            self.all += group.numel()
            self.elsewhere += int((group != self._index).sum())

        return count


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, recipe in jobs.items():
        checked = resolve(load_recipe(recipe)).recipe
        world = World.join("cpu", layout_of(checked))
        job = open_job(checked, prepare(checked).train, None, world=world)
        routed = Routed(job)
        with closing(ahead(job)) as batches:
            for job.step in (1, 2):
                routed.all = routed.elsewhere = 0
                with Sent() as sent:
                    train_step(job, batches)
        sums = world.everywhere([sent.bytes[kind] for kind in Sent.KINDS])
        found[name] = {kind: n / world.size for kind, n in zip(Sent.KINDS, sums, strict=True) if n}
        if world.layout.expert > 1:
            numbers = [sent.bytes["rows"], sent.bytes["all-to-all"], routed.all, routed.elsewhere]
            found[name]["everywhere"] = world.everywhere(numbers)
        torch.manual_seed(0)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).with_suffix(".result").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
