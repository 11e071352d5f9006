"""Writes that are either whole or not there: a temporary name beside the target, fsync, rename.

Leftovers of a killed process end in `.tmp`; nothing reads them and `remove_leftovers` deletes them.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ropewalk.errors import RopewalkError, UserError


def cache_directory() -> Path:
    """What can be made again: ROPEWALK_CACHE, or ~/.cache/ropewalk."""
    return Path(os.environ.get("ROPEWALK_CACHE") or Path.home() / ".cache" / "ropewalk")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file from elsewhere; UserError, naming it, where it cannot be read or holds no object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    return raw


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replaces `path` by `data` (text as UTF-8), creating its folder; a crash leaves the old file or the new.

    Raises RopewalkError when the disk is full; the old file is then untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    with atomic_file(path, needed=len(raw)) as temporary:
        temporary.write_bytes(raw)


@contextmanager
def atomic_file(path: str | Path, needed: int | None = None) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to; renamed to `path` on success, removed on failure.

    Raises UserError where `path` is a folder, RopewalkError when the disk is full; its message says `needed`,
    the bytes foreseen.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file is to be written there")
    temporary = _sibling(path)
    with naming_full_disk(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; renamed to `path` on success, removed on failure.

    Everything in it is on the disk before the rename. Raises UserError when `path` exists (unless
    `overwrite`), RopewalkError when the disk is full; its message says `needed`, the bytes foreseen.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; nothing was overwritten")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a folder is to be made there")
    temporary = _sibling(path)
    try:
        with naming_full_disk(path, needed):
            temporary.mkdir(parents=True)
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync(Path(folder, name))
                fsync(Path(folder))
            if path.exists():  # a folder cannot be replaced in one step: move the old one out of the way
                old = _sibling(path)
                os.rename(path, old)
                os.rename(temporary, path)
                shutil.rmtree(old)
            else:
                os.rename(temporary, path)
            fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: str | Path, unchanged_for: float = 0.0, named: str = "*") -> None:
    """Deletes what killed writers left in `folder`; where somebody else may be writing there, only what has
    not changed for so many seconds. `named` is a pattern, for a folder that has other people's files too."""
    before = time.time() - unchanged_for
    for leftover in Path(folder).glob(f".{named}.tmp"):
        if unchanged_for and _changed(leftover) > before:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    """When it or what is in it was last written to; of what is gone, and so somebody's, just now."""
    try:
        return max(inside.stat().st_mtime for inside in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns "no space left" into one message that names the place and the bytes `needed` and free."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk in an error of its own, which has the system's words but no errno
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(
            errno.ENOSPC
        ) in str(error)
        if not full or isinstance(error, RopewalkError):
            raise
        raise full_disk(path, needed) from error


def full_disk(path: Path, needed: int | None = None) -> RopewalkError:
    """The error for a disk that has no room for `path`."""
    room = f"{free_bytes(path):,} bytes free"
    if needed is not None:
        room = f"{needed:,} bytes needed, {room}"
    return RopewalkError(f"{path}: the disk is full ({room}); make room and try again")


def free_bytes(path: Path) -> int:
    """Bytes that can still be written at `path` or, where it does not exist, at its nearest parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
