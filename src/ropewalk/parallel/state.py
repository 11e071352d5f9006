"""Tensors of a training state on disk: each process writes its parts, any number of processes reads them.

Safetensors only (nothing is unpickled); torch.distributed.checkpoint finds which part lies where.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropewalk.parallel.sharding import local
from ropewalk.parallel.world import World

WHOLE = "tensors.safetensors"


def save_tensors(
    tensors: Mapping[str, Tensor], folder: Path, parameters: Mapping[str, Tensor], world: World
) -> None:
    """Writes `tensors` into `folder`. Those called KIND.NAME after a divided parameter NAME are parts of it;
    of others that several processes have, one is written."""
    if world.size == 1:
        return save_file(dict(tensors), folder / WHOLE)
    import torch.distributed.checkpoint as dcp

    parts = {name: _as_part(name, tensor, parameters) for name, tensor in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save(parts, storage_writer=writer)


def load_tensors(folder: Path, parameters: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What `save_tensors` wrote, whoever wrote it: of divided parameters the parts for this process."""
    if world.size == 1 and (folder / WHOLE).is_file():
        return load_file(folder / WHOLE)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(path=str(folder))
    wanted: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parameter = parameters.get(name.partition(".")[2])
        if parameter is not None and parameter.shape == stored.size:
            wanted[name] = torch.empty_like(parameter.detach(), dtype=stored.properties.dtype)
        else:
            wanted[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a single process, which is what is meant
        dcp.load(wanted, storage_reader=reader, no_dist=world.size == 1)
    return {name: local(tensor) for name, tensor in wanted.items()}


def _as_part(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    from torch.distributed.tensor import DTensor

    parameter = parameters.get(name.partition(".")[2])
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.to_local().shape or not tensor.ndim:
        return tensor
    return DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
