"""The processes of a run, and what they tell each other beside tensors."""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ropewalk.layout import DEGREES, Layout, told_by_launcher

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def processes() -> int:
    """How many torchrun (or a scheduler in its manner) has started; 1 where nobody did."""
    return told_by_launcher("WORLD_SIZE") or 1


def _take_leave() -> None:
    """Ends Gloo's threads before C++ is taken down, which now and then aborts while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def started() -> bool:
    """Whether this process is one of those."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


ALONE = Layout(replicate=1, shard=1)
EXPERT_AXES = ("expert_copies", "expert_parts", "expert")
"""of processes with the same blocks; neighbours have different experts: what is sent between them goes the
shortest way"""


@dataclass(frozen=True)
class World:
    """This process among the others. With one process nothing is sent, and everything is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    layout: Layout = ALONE
    mesh: "DeviceMesh | None" = None
    """an axis for each of `DEGREES`"""
    weights: "DeviceMesh | None" = None
    """what weights and states lie over: copies along the first axis, parts along the second"""
    experts: "DeviceMesh | None" = None
    """the same for experts where processes have different ones, which lie along the last of `EXPERT_AXES`"""

    @staticmethod
    def join(device: str, layout: Layout, timeout: float = 1800.0) -> "World":
        """Meets the other processes; needs torchrun's variables where there is more than one."""
        size = processes()
        layout = layout.over(size)
        if size == 1:
            return World(layout=layout)
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            # numbers on the host go by Gloo, so that nothing waits for a GPU
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            if device == "cpu":
                atexit.register(_take_leave)
        local = told_by_launcher("LOCAL_RANK") or 0
        if device == "cuda":
            torch.cuda.set_device(local)
        degrees = tuple(getattr(layout, name) for name in DEGREES)
        mesh = init_device_mesh(device, degrees, mesh_dim_names=DEGREES)
        if layout.data not in (1, size):
            mesh["replicate", "shard"]._flatten("rows")
        weights = mesh["replicate", "shard"]
        if layout.context > 1:
            if layout.data * layout.context != size:
                mesh["replicate", "shard", "context"]._flatten("tokens")
            axes = {
                "pipeline": layout.pipeline,
                "replicate": layout.replicate,
                "parts": layout.parts,
                "tensor": layout.tensor,
            }
            mesh_of_parts = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
            weights = mesh_of_parts["replicate", "parts"]
        experts = None
        if layout.expert > 1:
            names = ("pipeline", *EXPERT_AXES)
            sizes = tuple(getattr(layout, name) for name in names)
            experts = init_device_mesh(device, sizes, mesh_dim_names=names)
        return World(dist.get_rank(), size, local, layout, mesh, weights, experts)

    @property
    def first(self) -> bool:
        """The process that writes what only one may write."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """Which of `layout.data` parts of the rows is this process's."""
        whole = self.size // self.layout.pipeline  # those that have the same stages
        return self.rank % whole // (whole // self.layout.data)

    def index(self, axis: str) -> int:
        """This process's place along an axis of a mesh, or among the `parts` of the weights."""
        if axis in EXPERT_AXES:
            return 0 if self.experts is None else self.experts.get_local_rank(axis)
        if self.mesh is None or self.weights is None:
            return 0
        return self.weights.get_local_rank(1) if axis == "parts" else self.mesh.get_local_rank(axis)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the parts of a batch, for what is counted in whole rows; exact up to 2^53."""
        return self._total_over("rows", self.layout.data, numbers)

    def total_of_tokens(self, numbers: Sequence[float]) -> list[float]:
        """The same for what each process counted in its own tokens of the rows."""
        axis = "rows" if self.layout.context == 1 else "tokens"
        return self._total_over(axis, self.layout.data * self.layout.context, numbers)

    def _total_over(self, axis: str, processes: int, numbers: Sequence[float]) -> list[float]:
        if processes == 1:
            return list(numbers)
        return self._total(numbers, None if processes == self.size else self.group(axis))

    def everywhere(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, also those that share rows."""
        return list(numbers) if self.size == 1 else self._total(numbers, None)

    def sum_everywhere(self, value: Tensor) -> Tensor:
        """The same of a tensor, on its device, in place where there are several."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    @staticmethod
    def _total(numbers: Sequence[float], group: Any) -> list[float]:
        sums = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        return sums.tolist()

    def group(self, axis: str) -> Any:
        """This process's group along an axis of a mesh, or along `rows`, `tokens` or `parts`."""
        if axis in EXPERT_AXES:
            assert self.experts is not None
            return self.experts.get_group(axis)
        assert self.mesh is not None
        assert self.weights is not None
        return self.weights.get_group(1) if axis == "parts" else self.mesh.get_group(axis)

    def sum_along(self, axis: str, value: Tensor) -> Tensor:
        """The sum over the processes along an axis, in place where there are several."""
        if self.mesh is not None and getattr(self.layout, axis) > 1:
            dist.all_reduce(value, group=self.group(axis))
        return value

    def broadcast_along_pipeline(self, value: Tensor, stage: int) -> Tensor:
        """What the process with a stage has, in place in all of its `pipeline` group."""
        if self.layout.pipeline > 1:
            group = self.group("pipeline")
            dist.broadcast(value, dist.get_global_rank(group, self.layout.place(stage)), group=group)
        return value

    def share(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def each(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, everywhere."""
        values = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.everywhere([0.0])
