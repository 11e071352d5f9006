"""Attributes beside the documents: what each cleaning step says of each, a file for each unit and step."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.clean.step import Joined, Step, Texts
from ropewalk.data.documents import Documents
from ropewalk.data.part_files import PART, read_columns, read_part
from ropewalk.data.parts import Makers, Task, key
from ropewalk.files import atomic_file

OWN = ("id", "source", "file")
"""What can be asked of the documents themselves, besides attributes."""


@dataclass(frozen=True)
class Unit:
    """What was read of a unit of the input; `held_out` for validation that the recipe names."""

    documents: Path
    weight: int
    files: Mapping[str, str]
    held_out: bool
    source: str = ""

    def read(self) -> Documents:
        return Documents(self.documents, self.files)


@dataclass(frozen=True)
class MapUnit:
    """The task that runs a step's `map` over a unit."""

    path: Path
    weight: int
    documents: Path
    step: Step

    def make(self, path: Path) -> None:
        schema = self.step.map(Texts([])).schema
        with pq.ParquetWriter(path, schema, **PART) as writer:
            for records in Documents(self.documents).batches():
                texts = Texts([record.plain for record in records], [record.id for record in records])
                writer.write_table(self.step.map(texts).cast(schema))


class Attributes:
    """Of all units: made where they are asked for and not there yet."""

    def __init__(self, store: Path, units: Sequence[Unit], makers: Makers) -> None:
        self.store, self.units, self.makers = store, units, makers
        self.sizes = [len(unit.read()) for unit in units]
        self._files: dict[str, list[Path]] = {}
        """attribute -> its files, one for each unit"""

    @property
    def available(self) -> frozenset[str]:
        return frozenset(self._files)

    def add(self, step: Step, parts: "Callable[[list[Path]], JoinedParts]") -> None:
        """Runs a step; `parts` gives one that compares documents its view of the data."""
        made_from = [step.name, step.version, step.settings()]
        tasks: list[Task] = [
            MapUnit(self._path(step, [*made_from, unit.documents.name]), unit.weight, unit.documents, step)
            for unit in self.units
        ]
        self.makers.make(step.name, tasks)
        files = [task.path for task in tasks]
        if isinstance(step, Joined):
            view = parts(files)
            content = [*made_from, [path.name for path in files], view.fingerprint()]
            files = [self._path(step, [*content, i]) for i in range(len(files))]
            if not all(path.exists() for path in files):
                for path, table in zip(files, step.reduce(view), strict=True):
                    with atomic_file(path) as temporary:
                        pq.write_table(table, temporary, **PART)
        for name in step.attributes:
            self._files[name] = files

    def _path(self, step: Step, made_from: object) -> Path:
        return self.store / f"{step.name}-{key(made_from)}.parquet"

    def files(self, names: Sequence[str]) -> list[list[Path]]:
        """For each unit, the files in which these attributes are."""
        wanted = sorted({id(self._files[name]): name for name in names}.values())
        return [[self._files[name][i] for name in wanted] for i in range(len(self.units))]

    def table(self, unit: int, names: Sequence[str]) -> pa.Table:
        """Attributes of a unit, and what is in OWN of its documents."""
        files = dict.fromkeys(self._files[name][unit] for name in names if name in self._files)
        columns = read_columns([self.units[unit].documents, *files], names)
        return pa.table({name: columns[name] for name in names})


@dataclass(frozen=True)
class JoinedParts:
    """The `Parts` of a step that compares texts: see clean.step."""

    units: Sequence[Unit]
    sizes: Sequence[int]
    files: Sequence[Path]
    alive: Sequence[np.ndarray]
    preferences: Sequence[np.ndarray]

    def mapped(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        return read_part(self.files[part], columns)

    def kept(self, part: int) -> np.ndarray:
        return self.alive[part]

    def preference(self, part: int) -> np.ndarray:
        return self.preferences[part]

    def texts(self, part: int, rows: np.ndarray) -> list[str]:
        return [record.plain for record in self.units[part].read().at(rows)]

    def fingerprint(self) -> str:
        """Of all that `reduce` depends on besides what `map` wrote."""
        found = hashlib.sha256()
        for pair in zip(self.alive, self.preferences, strict=True):
            for array in pair:
                found.update(np.ascontiguousarray(array).view(np.uint8).data)
        return found.hexdigest()
