"""files: what is written is whole or not there, and a full disk is one clear message."""

import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ropewalk import files
from ropewalk.errors import RopewalkError, UserError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.atomic_write(path, "grün")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    files.atomic_write(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_atomic_write_keeps_the_old_file_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with files.atomic_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("1")
        assert temporary.parent == tmp_path
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), files.atomic_directory(tmp_path / "d") as temporary:
        temporary.write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_replaces_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(UserError, match="exists"), files.atomic_directory(path):
        pass
    assert (path / "old").exists()
    with files.atomic_directory(path, overwrite=True) as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_others_kept(tmp_path: Path) -> None:
    for name in (".a.1234.tmp", "kept.tmp", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / ".b.1234.tmp").write_text("")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "kept.tmp"]


def test_full_disk_names_the_path_and_the_bytes(small_disk: Path) -> None:
    files.atomic_write(small_disk / "a", b"x" * 700_000)
    with pytest.raises(
        RopewalkError, match=r"disk/a: the disk is full \(2,000,000 bytes needed, \d+,\d+ bytes free\)"
    ):
        files.atomic_write(small_disk / "a", b"y" * 2_000_000)
    assert (small_disk / "a").read_bytes() == b"x" * 700_000
    assert len(list(small_disk.iterdir())) == 1
    with (
        pytest.raises(RopewalkError, match="disk is full"),
        files.atomic_directory(small_disk / "d") as temporary,
    ):
        (temporary / "b").write_bytes(b"z" * 2_000_000)
    assert [p.name for p in small_disk.iterdir()] == ["a"]


def test_full_disk_is_recognized_when_safetensors_says_it(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with (
        pytest.raises(RopewalkError, match="disk is full"),
        files.atomic_directory(small_disk / "d") as temporary,
    ):
        save_file({"a": torch.zeros(1_000_000)}, temporary / "a.safetensors")
    assert list(small_disk.iterdir()) == []


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"rope")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"rope").hexdigest()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: is a folder"):
        files.atomic_write(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
