"""What is counted in one unit of the input: a task like the others, its file in parts/ an account that can be
added to those of other units."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ropewalk.clean.step import SPANS, Texts
from ropewalk.data.documents import Documents
from ropewalk.data.edits import edited
from ropewalk.data.part_files import part_schema, read_part
from ropewalk.data.parts import key
from ropewalk.data.verdicts import Verdicts
from ropewalk.look.sketch import Frequent, Quantiles

VERSION = 2
TAIL = 2
"""Documents that are shown of each end of an attribute."""
DROPPED = 3
"""Documents that are shown of those that a rule drops."""
NGRAM = 10
COUNTERS, PASSED_ON = 1 << 16, 1 << 13
"""Lines and n-grams that are counted at a time, and those that a unit hands on."""
WORDS = 1 << 10
"""Different values of an attribute of text that are counted."""
LONGEST = 300
"""Characters that are kept of a line or an n-gram."""
MOJIBAKE = re.compile(
    "[ÃÂ][\u0080-\u00bf]|â[\u0080-\u00bf€‚„…†‡ˆ‰‹‘’“”•–—˜™š›œž][\u0080-\u00bf“”™œžš¢¦]|[ÃÐÑ][€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•˜™š›œžŸ]"
)
"""UTF-8 that was read as Latin-1 or Windows-1252: Ã¤, Â°, â€™."""


@dataclass(frozen=True)
class ProfileUnit:
    """The task that counts a unit. Of documents that no rule dropped the texts are looked at, as edited."""

    path: Path
    weight: int
    documents: Path
    attributes: tuple[Path, ...]
    verdicts: Path | None

    @classmethod
    def of(cls, documents: Path, attributes: tuple[Path, ...], verdicts: Path | None) -> "ProfileUnit":
        made_from = [VERSION, *(path.name for path in (documents, *attributes)), verdicts and verdicts.name]
        path = documents.with_name(f"profile-{key(made_from)}.json")
        return cls(path, documents.stat().st_size, documents, attributes, verdicts)

    def make(self, path: Path) -> None:
        documents = Documents(self.documents)
        hashes = documents.columns("hash")["hash"].to_numpy()
        verdicts = None if self.verdicts is None else Verdicts.read(self.verdicts)
        kept = np.ones(len(hashes), bool) if verdicts is None else verdicts.kept
        account = {
            "documents": len(hashes),
            "kept": int(kept.sum()),
            "attributes": attributes(self.attributes, kept),
            "rules": {} if verdicts is None else dropped(verdicts, hashes),
            "edits": {} if verdicts is None else edits(verdicts),
            "texts": texts(documents, verdicts, kept),
        }
        path.write_text(json.dumps(account, ensure_ascii=False), encoding="utf-8")


def attributes(paths: tuple[Path, ...], kept: np.ndarray) -> dict[str, Any]:
    """Of each attribute the account of its type."""
    found: dict[str, Any] = {}
    for path in paths:
        for field in part_schema(path):
            if _seen_in_numbers(field.type):
                column = read_part(path, [field.name])[field.name].combine_chunks()
                found[field.name] = _attribute(column, kept)
    return found


def _seen_in_numbers(kind: pa.DataType) -> bool:
    """Signatures of duplicates and the like are not: nothing is to be seen in them."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return kind == SPANS or any(test(kind) for test in tests)


def _attribute(column: pa.Array, kept: np.ndarray) -> dict[str, Any]:
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy(zero_copy_only=False)
        read, left = Quantiles(), Quantiles()
        read.add(values)
        left.add(values[kept])
        return {"kind": "numbers", "read": read.dump(), "kept": left.dump(), **tails(values, kept)}
    if kind == SPANS:
        return {"kind": "places", **_places(column), "kept": _places(column.filter(pa.array(kept)))}
    return {"kind": "words", "read": counted(column), "kept": counted(column.filter(pa.array(kept)))}


def _places(column: pa.Array) -> dict[str, Any]:
    kinds = column.flatten().field("kind")
    documents = int(pc.sum(pc.greater(pc.list_value_length(column), 0)).as_py() or 0)
    return {"documents": documents, "places": len(kinds), "kinds": counted(kinds)}


def counted(column: pa.Array) -> dict[str, int]:
    """Value as text -> how often, of the WORDS most frequent; the rest is under "other"."""
    counts: Counter[str] = Counter()
    for pair in pc.value_counts(column.cast(pa.string())).to_pylist():
        counts["unknown" if pair["values"] is None else pair["values"]] += pair["counts"]
    return most(counts)


def most(counts: Mapping[str, int]) -> dict[str, int]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    result = dict(ordered[:WORDS])
    if len(ordered) > WORDS:
        result["other"] = result.get("other", 0) + sum(n for _, n in ordered[WORDS:])
    return result


def tails(values: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """The documents that are kept with the lowest and the highest values, as [value, row]."""
    rows = np.flatnonzero(kept & np.isfinite(values))
    order = rows[np.argsort(values[rows], kind="stable")]
    return {
        name: [[float(values[row]), row] for row in some.tolist()]
        for name, some in (("low", order[:TAIL]), ("high", order[::-1][:TAIL]))
    }


def dropped(verdicts: Verdicts, hashes: np.ndarray) -> dict[str, Any]:
    """Rule -> how many it drops, and the rows of some: those with the lowest hashes, as good as random."""
    column = verdicts.table["verdict"].combine_chunks().dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    result = {}
    for i, rule in enumerate(column.dictionary.to_pylist()):
        rows = np.flatnonzero(codes == i)
        some = rows[np.argsort(hashes[rows], kind="stable")][:DROPPED]
        result[rule] = {"dropped": len(rows), "rows": [[int(hashes[row]), int(row)] for row in some]}
    return result


def edits(verdicts: Verdicts) -> dict[str, Any]:
    """ "action kind" -> documents, places and characters, and the first places, as [row, start, end]."""
    found: dict[str, Any] = {}
    kept = verdicts.kept
    for row in np.flatnonzero(pc.list_value_length(verdicts.table["edits"]).to_numpy() > 0).tolist():
        if not kept[row]:
            continue
        seen = set()
        for edit in verdicts.table["edits"][row].as_py():
            what = f"{edit['action']} {edit['kind']}"
            entry = found.setdefault(what, {"documents": 0, "places": 0, "characters": 0, "rows": []})
            entry["documents"] += what not in seen
            entry["places"] += 1
            entry["characters"] += edit["end"] - edit["start"]
            if len(entry["rows"]) < DROPPED and what not in seen:
                entry["rows"].append([row, edit["start"], edit["end"]])
            seen.add(what)
    return found


def texts(documents: Documents, verdicts: Verdicts | None, kept: np.ndarray) -> dict[str, Any]:
    """Lengths, repeated lines and n-grams, wrong characters, of the documents that are kept."""
    characters, words = Quantiles(), Quantiles()
    lines, ngrams = Frequent(COUNTERS), Frequent(COUNTERS)
    wrong = Counter(mojibake=0, replacement=0)
    wrong_rows: list[int] = []
    for rows, batch in _kept(documents, verdicts, kept):
        looked = Texts(batch)
        characters.add(np.diff(looked.words.begins))
        words.add(looked.words.only.counts)
        _count_lines(looked, lines)
        _count_ngrams(looked, ngrams)
        for row, text in zip(rows, batch, strict=True):
            if not text.isascii():
                wrong["replacement"] += "\ufffd" in text
                if MOJIBAKE.search(text):
                    wrong["mojibake"] += 1
                    wrong_rows.append(row)
        del wrong_rows[DROPPED:]
    return {
        "characters": characters.dump(),
        "words": words.dump(),
        "lines": lines.shrunk(PASSED_ON).dump(),
        "ngrams": ngrams.shrunk(PASSED_ON).dump(),
        **wrong,
        "mojibake_rows": wrong_rows,
    }


def _kept(
    documents: Documents, verdicts: Verdicts | None, kept: np.ndarray
) -> Iterator[tuple[list[int], list[str]]]:
    row = 0
    changes = (
        np.zeros(len(kept), bool)
        if verdicts is None
        else pc.list_value_length(verdicts.table["edits"]).to_numpy() > 0
    )
    for records in documents.batches():
        here = range(row, row + len(records))
        rows = [i for i in here if kept[i]]
        some = [records[i - row] for i in rows]
        if verdicts is not None and changes[rows].any():
            some = [
                edited(record, verdicts.edits[i]).record if changes[i] else record
                for i, record in zip(rows, some, strict=True)
            ]
        yield rows, [record.plain for record in some]
        row += len(records)


def _count_lines(looked: Texts, lines: Frequent) -> None:
    filled = looked.lines.filled
    codes = looked.words.codes

    def example(i: int) -> str:
        return _text(codes, filled.starts[i], filled.ends[i])

    lines.add(looked.words.hashes_between(filled.starts, filled.ends), example)


def _count_ngrams(looked: Texts, ngrams: Frequent) -> None:
    only = looked.words.only
    hashes, first = only.ngrams(NGRAM)

    def example(i: int) -> str:
        return _text(only.codes, only.starts[first[i]], only.ends[first[i] + NGRAM - 1])

    ngrams.add(hashes, example)


def _text(codes: np.ndarray, start: int, end: int) -> str:
    """Lone surrogates cannot be written, and become the sign for what is no character."""
    part = codes[start : min(end, start + LONGEST)].astype("<u4").tobytes()
    return part.decode("utf-32-le", "replace") + ("…" if end - start > LONGEST else "")
