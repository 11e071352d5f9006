"""Documents as they were read, with everything that is known of each: attributes, verdicts, tokens.

A view is over the files in parts/ that a preparation, or a judgement without one, has made; of prepared data
it knows the ledger too. It is read a unit at a time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.data.build import LEDGER
from ropewalk.data.cleaning import Cleaner
from ropewalk.data.documents import Documents
from ropewalk.data.part_files import part_schema, read_columns, read_part
from ropewalk.data.shards import TokenShards
from ropewalk.data.verdicts import Verdicts
from ropewalk.errors import UserError

OWN = ("id", "source", "file", "line", "start", "end", "hash")
VERDICT = ("verdict", "failed", "duplicate_of")
TOKENS = ("split", "piece", "pieces")


def described(cleaner: Cleaner) -> dict[str, Any]:
    """The files of each unit in parts/, JSON-able: key `parts` of prepared.json."""
    about = {name: text for step in cleaner.steps for name, text in step.attributes.items()}
    files = cleaner.attributes.files(sorted(about))
    return {
        "attributes": about,
        "units": [
            {
                "source": unit.source,
                "held_out": unit.held_out,
                "documents": unit.documents.name,
                "attributes": [path.name for path in found],
                "verdicts": verdicts and verdicts.name,
            }
            for unit, found, verdicts in zip(cleaner.units, files, cleaner.verdicts, strict=True)
        ],
    }


@dataclass(frozen=True)
class Part:
    """The files of one unit of the input."""

    source: str
    held_out: bool
    documents: Path
    attributes: tuple[Path, ...]
    verdicts: Path | None

    def read(self) -> Documents:
        return Documents(self.documents)

    @cached_property
    def columns(self) -> dict[str, pa.DataType]:
        """The attributes there are, and their types."""
        return {field.name: field.type for path in self.attributes for field in part_schema(path)}


class View:
    """`store` is parts/; `parts` what `described` made; `cleaning` the cleaner's report; `folder` that of
    prepared data. Raises UserError for files that are gone."""

    def __init__(
        self,
        store: Path,
        parts: Mapping[str, Any],
        cleaning: Mapping[str, Any] | None,
        folder: Path | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.folder, self.report = store, folder, report
        self.attributes: Mapping[str, str] = parts["attributes"]
        """name -> what it is, with its unit"""
        self.cleaning = cleaning
        self.rules: Sequence[Mapping[str, Any]] = cleaning["rules"] if cleaning else ()
        self.parts = [
            Part(
                unit["source"],
                unit["held_out"],
                store / unit["documents"],
                tuple(store / name for name in unit["attributes"]),
                unit["verdicts"] and store / unit["verdicts"],
            )
            for unit in parts["units"]
        ]
        for part in self.parts:
            for path in (part.documents, *part.attributes, *filter(None, [part.verdicts])):
                if not path.is_file():
                    raise UserError(f"{path}: is gone; run ropewalk prepare --overwrite to make it again")

    @classmethod
    def open(cls, folder: Path) -> "View":
        """Prepared data, from its folder. Raises UserError for a folder that is none."""
        path = folder / "prepared.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            report, parts = found["report"], found["parts"]
            return cls(folder.absolute().parent / "parts", parts, report.get("cleaning"), folder, report)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a folder that ropewalk prepare made") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not of this version; run ropewalk prepare --overwrite") from None

    def extend(self, attributes: Mapping[str, str], files: Sequence[Sequence[Path]]) -> None:
        """More attributes, and for each part the files in which they are."""
        self.attributes = {**self.attributes, **attributes}
        pairs = zip(self.parts, files, strict=True)
        self.parts = [replace(part, attributes=(*part.attributes, *more)) for part, more in pairs]

    @cached_property
    def sizes(self) -> list[int]:
        return [len(part.read()) for part in self.parts]

    @cached_property
    def begins(self) -> np.ndarray:
        """[parts + 1] int64: number, in the whole data, of each part's first document."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    @property
    def known(self) -> list[str]:
        """All columns that `table` has."""
        tokens = (*TOKENS, "tokens") if self.folder else ()
        attributes = [name for part in self.parts[:1] for name in part.columns]
        return [*dict.fromkeys([*OWN, *VERDICT, *tokens, "held_out", "kept", *attributes])]

    def table(self, i: int, names: Sequence[str]) -> pa.Table:
        """Columns of part i, a row for each of its documents."""
        part, size = self.parts[i], self.sizes[i]
        columns: dict[str, Any] = read_columns([part.documents, *part.attributes], names)
        if any(name in names for name in (*VERDICT, "kept")):
            verdicts = Verdicts.read(part.verdicts, size, VERDICT)
            columns |= dict(zip(VERDICT, verdicts.table.columns, strict=True))
            columns["kept"] = pa.array(verdicts.kept)
        if self.folder and any(name in names for name in (*TOKENS, "tokens", "kept")):
            rows = slice(*self.begins[i : i + 2].tolist())
            columns |= {name: pa.array(self._ledger[name][rows]) for name in TOKENS}
            columns["tokens"] = pa.array(self.tokens[rows])
            columns["kept"] = pa.array(self._ledger["pieces"][rows] > 0)
        if "held_out" in names:
            columns["held_out"] = pa.array(np.full(size, part.held_out))
        return pa.table({name: columns[name] for name in names})

    @cached_property
    def _ledger(self) -> dict[str, np.ndarray]:
        """Where the tokens of each document of the whole data are; 21 bytes a document are kept of it."""
        assert self.folder is not None
        table = read_part(self.folder / LEDGER, TOKENS, read_dictionary=["split"])
        if len(table) != self.begins[-1]:
            raise UserError(f"{self.folder / LEDGER}: does not fit; run ropewalk prepare --overwrite")
        split = table["split"].cast(pa.string()).to_numpy(zero_copy_only=False)
        return {"split": split, "piece": table["piece"].to_numpy(), "pieces": table["pieces"].to_numpy()}

    @cached_property
    def tokens(self) -> np.ndarray:
        """[documents] int64 of prepared data: tokens of each, all its pieces together."""
        assert self.folder is not None
        ledger = self._ledger
        result = np.zeros(len(ledger["piece"]), np.int64)
        for name in ("train", "validation"):
            here = np.flatnonzero(ledger["split"] == name)
            if len(here):
                ends = np.concatenate([[0], np.cumsum(TokenShards.open(self.folder / name).lengths)])
                first, count = ledger["piece"][here], ledger["pieces"][here]
                result[here] = ends[first + count] - ends[first]
        return result

    def place(self, number: int) -> tuple[int, int]:
        """(part, row) of a document by its number in the whole data."""
        part = int(np.searchsorted(self.begins, number, side="right")) - 1
        return part, number - int(self.begins[part])

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a document's attributes, with the name of the document that it is a duplicate of."""
        result = dict(values)
        for attribute, number in values.items():
            if attribute.endswith("duplicate_of") and isinstance(number, int) and number >= 0:
                part, row = self.place(number)
                result[attribute] = self.table(part, ["id"])["id"][row].as_py()
        return result
