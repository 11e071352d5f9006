"""A source of documents and its files: a path or a URL; a file, a folder, a glob, a saved dataset."""

import glob
import json
import os
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ropewalk.data.readers.kinds import DOCUMENTS, KNOWN, hidden, kind_of
from ropewalk.data.readers.streams import filesystem, is_url, is_web
from ropewalk.data.records import Columns
from ropewalk.errors import UserError


@dataclass(frozen=True)
class Source:
    """One set of documents: a file, a folder or a glob; and its columns, where they are said."""

    path: str
    name: str
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def named(self) -> Columns:
        return Columns(self.text, self.messages, self.prompt, self.completion)


@dataclass(frozen=True)
class InputFile:
    """A file of a source: `path` is a path here or a URL; `name` is its path below the source's own, with
    forward slashes."""

    path: str
    name: str


def files_of(source: Source) -> tuple[list[InputFile], list[str]]:
    """(files to read, in a fixed order; files of folders that are left alone for their extension).

    Folders are read for documents (text, source code, HTML, PDF); data files in them are named or globbed.
    A folder that the library `datasets` saved is read as what it is. Raises UserError for a path that is not
    there, matches nothing or has an extension that no reader knows.
    """
    if not source.path:
        raise UserError(f"data source {source.name}: its path is empty; name a file, a folder or a URL")
    found = _remote(source) if is_url(source.path) else _local(source)
    files = list({file.path: file for file in found.files}.values())
    for file in files:
        if kind_of(file.name) is None:
            suffix = PurePosixPath(file.name).suffix
            raise UserError(f"{file.path}: unknown extension {suffix!r}; known are {KNOWN}")
    if not files:
        hint = ""
        data = next((path for path in found.ignored if kind_of(path)), None)
        if data is not None:
            suffix = PurePosixPath(data).suffix
            hint = f"; to read its data files, give a glob such as {source.path.rstrip('/')}/*{suffix}"
        raise UserError(f"{source.path}: no text, source, HTML or PDF file in this folder{hint}")
    return files, found.ignored


@dataclass
class _Found:
    files: list[InputFile]
    ignored: list[str]

    def add_folder(self, paths: list[tuple[str, str]], base: str, read: Callable[[str], bytes]) -> None:
        """A folder's files as (path, path below the folder); `base` is what names are below of."""
        tops = {below: path for path, below in paths}
        if "state.json" in tops or "dataset_dict.json" in tops:
            self.files += _saved_dataset(tops, base, read)
            return
        visible = [(path, below) for path, below in paths if not hidden(PurePosixPath(below).parts)]
        for path, below in sorted(visible, key=lambda item: PurePosixPath(item[1]).parts):
            kind = kind_of(below)
            if kind is not None and kind.content in DOCUMENTS:
                self.files.append(InputFile(path, posixpath.join(base, below)))
            else:
                self.ignored.append(path)


def _local(source: Source) -> _Found:
    path = Path(os.path.expanduser(source.path))
    if os.path.exists(
        path
    ):  # pathlib's raises for names that no file can have, and for a user who is not there
        items, base = [path], path if path.is_dir() else path.parent
    else:
        fixed = re.split(r"[*?\[]", str(path), maxsplit=1)[0]
        base = Path(fixed).parent if fixed and not fixed.endswith(os.sep) else Path(fixed)
        items = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not items:
            kind = "matches no file" if glob.has_magic(str(path)) else "no such file or folder"
            raise UserError(f"{source.path}: {kind} (data source {source.name})")
    found = _Found([], [])
    for item in items:
        name = item.relative_to(base).as_posix()
        if not item.is_dir():
            found.files.append(InputFile(str(item), name))
            continue
        inside = [Path(where, file) for where, _, files in os.walk(item) for file in files]
        paths = [(str(p), p.relative_to(item).as_posix()) for p in inside]
        found.add_folder(paths, "" if name == "." else name, lambda p: Path(p).read_bytes())
    for file in found.files:
        if not os.path.isfile(file.path):  # of a pipe nobody may ever write the end
            raise UserError(f"{file.path}: neither a file nor a link to one; leave it out")
    return found


def _remote(source: Source) -> _Found:
    if is_web(source.path):  # no listing; a ? begins a query
        return _Found([InputFile(source.path, posixpath.basename(urlsplit(source.path).path))], [])
    system, path = filesystem(source.path)
    found = _Found([], [])
    try:
        if system.exists(path):
            items, base = [path], path if system.isdir(path) else posixpath.dirname(path)
        else:
            base = posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
            items = sorted(system.glob(path)) if glob.has_magic(path) else []
        for item in items:
            name = posixpath.relpath(item, base) if base else item.lstrip("/")
            if not system.isdir(item):
                found.files.append(InputFile(system.unstrip_protocol(item), name))
                continue
            inside = [(system.unstrip_protocol(p), posixpath.relpath(p, item)) for p in system.find(item)]
            found.add_folder(inside, "" if name == "." else name, lambda p: system.cat_file(p))
    except UserError:
        raise
    except Exception as error:  # each file system has its own kinds
        raise UserError(f"{source.path}: cannot be listed ({error})") from None
    if not items:
        raise UserError(f"{source.path}: no such file or folder, or no match (data source {source.name})")
    return found


def _saved_dataset(tops: dict[str, str], base: str, read: Callable[[str], bytes]) -> list[InputFile]:
    """The Arrow files that `state.json` of `datasets.Dataset.save_to_disk` lists, in its order."""
    state = tops.get("state.json") or tops["dataset_dict.json"]
    try:
        account = json.loads(read(state))
        if "state.json" not in tops:
            splits = ", ".join(str(name) for name in account["splits"])
            raise UserError(f"{state}: is a dataset of several splits; add one of them to the path: {splits}")
        names = [entry["filename"] for entry in account["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{state}: not the state of a saved dataset") from None
    missing = [name for name in names if name not in tops]
    if missing:
        raise UserError(f"{state}: names {missing[0]}, which is not beside it; the dataset is not whole")
    return [InputFile(tops[name], posixpath.join(base, name)) for name in names]
