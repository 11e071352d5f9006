"""The accounts of units added up: of a source, or of everything."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ropewalk.look.sketch import Frequent, Quantiles
from ropewalk.look.unit import DROPPED, PASSED_ON, TAIL, most

Row = tuple[int, int]
"""A part, and a row of it."""


@dataclass
class Numbers:
    """An attribute: of all documents, and of those that are kept; the ends as (value, part, row)."""

    read: Quantiles = field(default_factory=Quantiles)
    kept: Quantiles = field(default_factory=Quantiles)
    low: list[tuple[float, int, int]] = field(default_factory=list)
    high: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, part: int, account: Mapping[str, Any]) -> None:
        self.read.merge(Quantiles.load(account["read"]))
        self.kept.merge(Quantiles.load(account["kept"]))
        self.low = sorted([*self.low, *((v, part, row) for v, row in account["low"])])[:TAIL]
        high = [*self.high, *((v, part, row) for v, row in account["high"])]
        self.high = sorted(high, key=lambda item: (-item[0], item[1:]))[:TAIL]


@dataclass
class Places:
    """An attribute that names places: in how many documents there are some, how many, and of which kinds."""

    documents: int = 0
    places: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, account: Mapping[str, Any]) -> None:
        self.documents += account["documents"]
        self.places += account["places"]
        self.kinds = most(Counter(self.kinds) + Counter(account["kinds"]))


@dataclass
class Total:
    documents: int = 0
    kept: int = 0
    numbers: dict[str, Numbers] = field(default_factory=dict)
    words: dict[str, dict[str, Counter]] = field(default_factory=dict)
    """attribute -> "read" and "kept" -> value -> documents"""
    places: dict[str, dict[str, Places]] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)
    dropped_rows: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    """rule -> (hash, part, row)"""
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)
    characters: Quantiles = field(default_factory=Quantiles)
    word_counts: Quantiles = field(default_factory=Quantiles)
    lines: Frequent = field(default_factory=lambda: Frequent(PASSED_ON))
    ngrams: Frequent = field(default_factory=lambda: Frequent(PASSED_ON))
    wrong: Counter = field(default_factory=Counter)
    mojibake: list[Row] = field(default_factory=list)

    def add(self, part: int, account: Mapping[str, Any]) -> None:
        """What a `ProfileUnit` wrote of a part."""
        self.documents += account["documents"]
        self.kept += account["kept"]
        for name, attribute in account["attributes"].items():
            self._attribute(name, part, attribute)
        for rule, found in account["rules"].items():
            self.dropped[rule] += found["dropped"]
            rows = [*self.dropped_rows.get(rule, []), *((h, part, row) for h, row in found["rows"])]
            self.dropped_rows[rule] = sorted(rows)[:DROPPED]
        for what, found in account["edits"].items():
            entry = self.edits.setdefault(what, {"documents": 0, "places": 0, "characters": 0, "rows": []})
            for name in ("documents", "places", "characters"):
                entry[name] += found[name]
            entry["rows"] = [*entry["rows"], *([part, *row] for row in found["rows"])][:DROPPED]
        texts = account["texts"]
        self.characters.merge(Quantiles.load(texts["characters"]))
        self.word_counts.merge(Quantiles.load(texts["words"]))
        self.lines.merge(Frequent.load(texts["lines"]))
        self.ngrams.merge(Frequent.load(texts["ngrams"]))
        self.wrong.update({name: texts[name] for name in ("mojibake", "replacement")})
        self.mojibake = [*self.mojibake, *((part, row) for row in texts["mojibake_rows"])][:DROPPED]

    def _attribute(self, name: str, part: int, account: Mapping[str, Any]) -> None:
        if account["kind"] == "numbers":
            self.numbers.setdefault(name, Numbers()).add(part, account)
        elif account["kind"] == "words":
            counts = self.words.setdefault(name, {"read": Counter(), "kept": Counter()})
            for which in ("read", "kept"):
                counts[which] = Counter(most(counts[which] + Counter(account[which])))
        else:
            entry = self.places.setdefault(name, {"read": Places(), "kept": Places()})
            entry["read"].add(account)
            entry["kept"].add(account["kept"])
