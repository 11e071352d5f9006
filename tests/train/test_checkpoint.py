"""checkpoint: whole or not there, damage is noticed and named, old ones are pruned but the best is kept."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ropewalk.errors import RopewalkError
from ropewalk.files import free_bytes
from ropewalk.parallel import World, load_tensors
from ropewalk.train import checkpoint as ck
from ropewalk.train import saving
from ropewalk.train.checkpoint import best_checkpoint, list_checkpoints, newest_valid_checkpoint
from ropewalk.train.saving import Contents, Saver


def weights(path: Path, _: object = None) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)


TENSORS = {"master.a": torch.arange(5.0), "step.a": torch.tensor(2.0)}


def save(
    run: Path,
    step: int,
    loss: float | None = None,
    keep: int = 9,
    needed: int = 1000,
    copy: bool = True,
    tensors: dict[str, torch.Tensor] = TENSORS,
) -> Path:
    random_tensors, random_json = ck.random_state()
    contents = Contents(
        step,
        tensors={**tensors, **random_tensors},
        trained={},
        frozen={},
        state=json.dumps({"step": step, "steps": 10, "loader": {"seed": 1}, "random": random_json}),
        save_model=weights,
        needed=needed,
        validation_loss=loss,
    )
    saver = Saver(run / "checkpoints", keep)
    saver.begin(contents, copy)
    saved = saver.finish()
    assert saved is not None
    return saved.path


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoint / "state", {}, World())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def test_layout_and_what_is_read_back(run: Path) -> None:
    path = save(run, 3, loss=1.5)
    assert path == run / "checkpoints" / "step-00000003"
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    state = {"state/state.json", "state/tensors.safetensors"}
    assert files == {"MANIFEST.json", "model/model.safetensors", *state}
    assert set(json.loads((path / "MANIFEST.json").read_text())["files"]) == files - {"MANIFEST.json"}
    tensors, values = tensors_of(path), ck.load_state(path)
    assert torch.equal(tensors["master.a"], torch.arange(5.0))
    assert values["step"] == 3
    assert values["loader"] == {"seed": 1}
    assert newest_valid_checkpoint(run) == (path, [])


def test_no_checkpoint_yet(run: Path) -> None:
    assert newest_valid_checkpoint(run) == (None, [])


@pytest.mark.parametrize(
    "name", ["MANIFEST.json", "model/model.safetensors", "state/state.json", "state/tensors.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_any_damage_to_any_file_is_noticed_and_the_one_before_used(run: Path, name: str, damage: str) -> None:
    before = save(run, 1)
    file = save(run, 2) / name
    raw = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(raw[:-7])
    else:
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    found, warnings = newest_valid_checkpoint(run)
    assert found == before
    assert len(warnings) == 1
    assert str(file) in warnings[0]
    assert "step-00000002 is not used" in warnings[0]


def test_every_flipped_bit_of_a_manifest_is_noticed(run: Path) -> None:
    """But for the white space, which means nothing."""
    path = save(run, 1, loss=0.5) / "MANIFEST.json"
    raw = path.read_bytes()
    for place, byte in enumerate(raw):
        if not chr(byte).isspace():
            path.write_bytes(raw[:place] + bytes([byte ^ 1]) + raw[place + 1 :])
            assert ck.find_damage(path.parent) is not None, (place, raw[place - 5 : place + 5])
    path.write_bytes(raw)
    assert ck.find_damage(path.parent) is None


def test_what_cannot_be_read_is_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(run, 1)
    newest = save(run, 2)
    hashed = ck.sha256

    def sha256(path: Path) -> str:
        if newest in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return hashed(path)

    monkeypatch.setattr(ck, "sha256", sha256)
    found, (warning,) = newest_valid_checkpoint(run)
    assert found == before
    assert re.search(r"step-00000002/\S+: cannot be read \(Input/output error\)", warning)
    (newest / "MANIFEST.json").unlink()
    (newest / "MANIFEST.json").mkdir()
    assert "MANIFEST.json: cannot be read (Is a directory)" in str(ck.find_damage(newest))


def test_a_folder_of_another_name_is_no_checkpoint(run: Path) -> None:
    """A copy that a person made is left alone, and never loaded in place of what it was copied from."""
    path = save(run, 1)
    for name in ("step-00000001.bak", "step-00000002-copy", "step-2"):
        shutil.copytree(path, path.with_name(name))
    assert list_checkpoints(path.parent) == [path]
    assert newest_valid_checkpoint(run) == (path, [])
    save(run, 3)
    ck.prune(path.parent, 1)
    assert path.with_name("step-00000001.bak").is_dir()


def test_when_all_are_damaged_the_error_names_each(run: Path) -> None:
    for step in (1, 2):
        (save(run, step) / "MANIFEST.json").write_text("{}")
    with pytest.raises(RopewalkError, match=r"step-00000002.*step-00000001.*no whole checkpoint"):
        newest_valid_checkpoint(run)


def test_a_save_that_fails_leaves_nothing_and_touches_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(run, 1)

    def fail(*_: object) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr(saving, "write_manifest", fail)
    with pytest.raises(RuntimeError):
        save(run, 2, keep=1)
    assert list((run / "checkpoints").iterdir()) == [before]


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def save_and_die(run: Path, event: int, copy: bool) -> bool:
    """In a child: saves step 2 over step 1 with keep=1, killed at its n-th file operation; whether it was."""
    child = os.fork()
    if child == 0:
        left = event

        def watch(name: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if name in OPERATIONS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            save(run, 2, keep=1, copy=copy)
            os._exit(0)
        finally:
            os._exit(1)  # whatever goes wrong, a child must not go on with the tests
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("copy", [True, False])
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint(run: Path, copy: bool) -> None:
    event, found = 1, set()
    while True:
        save(run, 1)
        killed = save_and_die(run, event, copy)
        checkpoint, warnings = newest_valid_checkpoint(run)
        assert checkpoint is not None, event
        assert warnings == []
        found.add(checkpoint.name)
        shutil.rmtree(run)
        (run / "checkpoints").mkdir(parents=True)
        if not killed:
            break
        event += 1
    assert event > 20
    assert found == {"step-00000001", "step-00000002"}


def test_leftovers_of_a_killed_save_are_ignored_and_then_cleaned(run: Path) -> None:
    before = save(run, 1)
    leftover = run / "checkpoints" / ".step-00000002.0123abcd.tmp"
    weights(leftover)
    assert newest_valid_checkpoint(run) == (before, [])
    save(run, 3)
    assert not leftover.exists()


def test_the_newest_and_the_best_are_kept(run: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, 2.4], 1):
        save(run, step, loss, keep=2)
    assert [int(p.name[5:]) for p in list_checkpoints(run / "checkpoints")] == [2, 5, 6]
    assert best_checkpoint(run / "checkpoints") == run / "checkpoints" / "step-00000002"


def test_a_validation_loss_can_be_noted_later(run: Path) -> None:
    path = save(run, 1)
    assert best_checkpoint(run / "checkpoints") is None
    ck.note_validation(path, 0.25)
    assert best_checkpoint(run / "checkpoints") == path
    assert newest_valid_checkpoint(run) == (path, [])


def test_the_same_step_can_be_saved_again(run: Path) -> None:
    save(run, 1)
    path = save(run, 1, loss=2.0)
    assert newest_valid_checkpoint(run) == (path, [])
    assert list((run / "checkpoints").iterdir()) == [path]


def test_generators_come_back(run: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    np.random.randn()  # leaves a cached second value
    path = save(run, 1)
    draw = lambda: (torch.rand(3).tolist(), random.random(), np.random.rand(), np.random.randn())  # noqa: E731
    first = draw()
    tensors, values = tensors_of(path), ck.load_state(path)
    ck.set_random_state(tensors, values["random"])
    assert draw() == first


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory on a file system of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    (path / "checkpoints").mkdir()
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_named_and_costs_no_checkpoint(small_disk: Path, foreseen: bool) -> None:
    before = save(small_disk, 1)
    (small_disk / "filler").write_bytes(b"x" * (free_bytes(small_disk) - 12_000))
    with pytest.raises(
        RopewalkError, match=r"step-00000002: the disk is full \([\d,]+ bytes needed, [\d,]+ bytes free"
    ):
        save(small_disk, 2, keep=1, needed=1_000_000 if foreseen else 0)
    assert newest_valid_checkpoint(small_disk) == (before, [])
    assert list((small_disk / "checkpoints").iterdir()) == [before]
