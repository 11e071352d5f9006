"""state: parts on disk are put together by whoever reads them, and torch reads what we write."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.parallel import Part, Stored, World, load_tensors, write_parts

ROWS = ((0, 3), (3, 3), (6, 0), (6, 1))
"""begin and number of the rows that each of four processes has: uneven, and one has none"""


def write(folder: Path, whole: dict[str, Tensor], files: int = 4) -> None:
    for rank in range(files):
        at, count = ROWS[rank]
        tensors = {name: t[at : at + count] if t.ndim else t for name, t in whole.items()}
        parts = {
            name: Part((at,) + (0,) * (t.ndim - 1), (count, *t.shape[1:]), tuple(t.shape))
            if t.ndim
            else Part((), (), (), rank == 0)
            for name, t in whole.items()
        }
        write_parts(folder / f"tensors-{rank + 1:05d}-of-00004.safetensors", tensors, parts)


@pytest.fixture
def whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "master.a": torch.randn(7, 5),
        "exp_avg.a": torch.randn(7, 5).bfloat16(),
        "master.b": torch.randn(7),
        "step.a": torch.tensor(3.0),
        "codes.a": torch.arange(14, dtype=torch.uint8).view(7, 2),
    }


def test_any_part_is_read_from_any_parts(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    write(tmp_path, whole)
    with Stored(tmp_path) as stored:
        assert set(stored.names()) == whole.keys()
        for name, tensor in whole.items():
            assert stored.shape(name) == tuple(tensor.shape)
            assert torch.equal(stored.read(name), tensor)
        for start in range(7):
            for stop in range(start, 8):
                for left, right in ((0, 5), (1, 3)):
                    part = Part((start, left), (stop - start, right - left), (7, 5))
                    wanted = whole["master.a"][start:stop, left:right]
                    assert torch.equal(stored.read("master.a", part), wanted)
    assert load_tensors(tmp_path, {}, World()).keys() == whole.keys()


def test_a_missing_part_is_noticed(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    write(tmp_path, whole)
    (tmp_path / "tensors-00002-of-00004.safetensors").unlink()
    with Stored(tmp_path) as stored, pytest.raises(RopewalkError, match=r"a part of master\.a is missing"):
        stored.read("master.a")


def test_torch_reads_what_is_written(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """torch.distributed.checkpoint's own reader, as an independent one."""
    import torch.distributed.checkpoint as dcp

    write(tmp_path, whole)
    found = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(path=str(tmp_path)), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
