"""Members of zip and tar archives, as streams, in the order in which they are stored. Nothing is unpacked."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from ropewalk.data.readers.kinds import ARCHIVES, Kind, hidden, kind_of
from ropewalk.data.readers.streams import Stream, Unreadable, refuse_bomb, seekable
from ropewalk.errors import UserError


def members(stream: Any, path: str, content: str) -> Iterator[tuple[str, Kind, Stream]]:
    """(name, kind, stream) of the members that a reader knows; a stream is good until the next is asked for.

    Raises UserError for an archive in the archive, an encrypted member and a bomb; Unreadable for damage.
    """
    yield from _zip(stream, path) if content == "zip" else _tar(stream, path)


def _known(name: str, path: str) -> Kind | None:
    kind = kind_of(name)
    if name.endswith("/") or hidden(PurePosixPath(name).parts):
        return None
    if kind is not None and kind.content in ARCHIVES:
        raise UserError(f"{path}!{name}: an archive in an archive is not read; unpack {path} first")
    return kind


def _zip(stream: Any, path: str) -> Iterator[tuple[str, Kind, Stream]]:
    with seekable(stream) as file:
        try:
            archive = zipfile.ZipFile(file)
        except OSError:
            raise
        except Exception as error:  # zipfile has many ways to fail at a directory that is none
            raise UserError(f"{path}: not a readable zip archive ({error})") from None
        size, given = file.seek(0, 2), 0

        def count(more: int) -> None:
            """All members together are held against the archive's size: they may overlap (Fifield 2019)."""
            nonlocal given
            given += more
            refuse_bomb(path, given, size)

        for info in archive.infolist():
            kind = _known(info.filename, path)
            if kind is None:
                continue
            if info.flag_bits & 1:
                raise UserError(f"{path}!{info.filename}: is encrypted; decrypt {path} first")
            try:
                member = archive.open(info)
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise Unreadable(f"the member {info.filename} cannot be read ({error})") from None
            with member:
                yield info.filename, kind, _Member(member, count)


class _Member:
    """A member's bytes, which cannot seek. `count` is told how many are given."""

    def __init__(self, member: Any, count: Callable[[int], None] | None = None) -> None:
        self.member, self.count = member, count

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self.member.read1(size)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's; bz2 has no other kind
                raise
            raise Unreadable(f"is damaged ({error or 'it ends too early'})") from None
        if self.count is not None:
            self.count(len(data))
        return data


def _tar(stream: Stream, path: str) -> Iterator[tuple[str, Kind, Stream]]:
    """Read in one go (mode "r|"), so that nothing of it need be held or sought. Links are not followed."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            while (info := archive.next()) is not None:
                archive.members = []  # it would keep them all
                kind = _known(info.name, path) if info.isreg() else None
                if kind is None:
                    continue
                if info.issparse():
                    raise UserError(f"{path}!{info.name}: is a sparse file; unpack {path} first")
                member = archive.extractfile(info)
                assert member is not None
                yield info.name, kind, _Member(member)  # it says that it could seek
    except (tarfile.TarError, EOFError) as error:
        raise Unreadable(f"not a readable tar archive, or its end is missing ({error})") from None
