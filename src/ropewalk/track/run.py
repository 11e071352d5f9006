"""The run directory: recipe, environment, lineage, metrics, samples, checkpoints and report of one run."""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ropewalk.errors import RopewalkError, UserError
from ropewalk.files import atomic_write, naming_full_disk

_line = json.JSONEncoder(separators=(",", ":")).encode


class RunDirectory:
    """`runs/<name>-<id>/`. Metrics are append-only JSON lines, one file per writer: writers never meet."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        """`writes`: False for processes that train along, of which one writes."""
        self.path, self.writes = path, writes
        self._writers: dict[str, TextIO] = {}

    @classmethod
    def create(
        cls, root: str | Path, name: str, recipe_yaml: str, lineage: dict[str, Any], id: str | None = None
    ) -> "RunDirectory":
        """A new directory; its `id` is the time and four random hex digits. UserError where it exists."""
        run = cls(Path(root) / f"{name}-{id or time.strftime('%Y%m%d-%H%M%S-') + secrets.token_hex(2)}")
        with naming_full_disk(run.path):
            run.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                run.path.mkdir()
            except FileExistsError:
                raise UserError(
                    f"{run.path}: this run exists and nothing of it was touched; continue it with "
                    f"`ropewalk resume {run.path}`, or choose another name"
                ) from None
            run.samples_path.mkdir()
            run.checkpoints_path.mkdir()
        run.write_json("lineage.json", lineage)
        run.write_text("recipe.yaml", recipe_yaml)  # last: what has a recipe.yaml is a whole run directory
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """An existing directory; UserError where there is none."""
        run = cls(Path(path))
        if not (run.path / "recipe.yaml").is_file():
            raise UserError(f"{path}: not a run directory (it has no recipe.yaml); see `ropewalk runs ls`")
        return run

    @property
    def samples_path(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def log(self, record: dict[str, Any], writer: str = "train") -> None:
        """Appends a line to metrics-WRITER.jsonl that survives the process (after `sync`, the machine)."""
        if not self.writes:
            return
        file = self._writers.get(writer)
        if file is None:
            file = self._writers[writer] = self.metrics_path(writer).open("a", encoding="utf-8")
            _drop_torn_line(self.metrics_path(writer))
        with naming_full_disk(self.metrics_path(writer)):
            file.write(_line(record) + "\n")
            file.flush()

    def sync(self) -> None:
        """Forces all logged records onto the disk: call it before a checkpoint that they belong to."""
        for file in list(self._writers.values()):  # a thread may call this while another one logs
            os.fsync(file.fileno())

    def read(self, writer: str = "train") -> list[dict[str, Any]]:
        """All records in order. A last line cut short by a kill is dropped; other damage: RopewalkError."""
        path = self.metrics_path(writer)
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(_record(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise RopewalkError(
                    f"{path}:{number}: broken record ({error}); delete the line to go on"
                ) from None
        return records

    def truncate(self, step: int, writer: str = "train") -> list[dict[str, Any]]:
        """Drops the records after `step`, so that a resumed trace has each step once; gives what is left."""
        kept = [record for record in self.read(writer) if record.get("step", 0) <= step]
        self.close()
        if self.writes and self.metrics_path(writer).exists():
            text = "".join(_line(record) + "\n" for record in kept)
            atomic_write(self.metrics_path(writer), text)
        return kept

    def metrics_path(self, writer: str = "train") -> Path:
        return self.path / f"metrics-{writer}.jsonl"

    def write_text(self, name: str, text: str) -> None:
        """Writes one file of the directory, whole or not at all."""
        if self.writes:
            atomic_write(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, default=str) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the directory; None where it is missing."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise RopewalkError(f"{path}: not valid JSON ({error})") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training this run; the lock dies with the process that holds it."""
        if not self.writes:
            yield
            return
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is training this run") from None
            yield

    def locked(self) -> bool:
        """Whether a process is training this run now (on this machine). Writes nothing."""
        if not (self.path / "lock").exists():
            return False
        with open(self.path / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def close(self) -> None:
        for file in self._writers.values():
            file.close()
        self._writers.clear()


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _drop_torn_line(path: Path) -> None:
    """Cuts off what a kill or a full disk has left of a last line: the next one must not be added to it."""
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        os.truncate(path, raw.rfind(b"\n") + 1)
