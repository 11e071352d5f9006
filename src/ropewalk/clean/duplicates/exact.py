"""Documents that are the same text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ropewalk.clean.duplicates.rows import Clusters, cluster_tables, rows_of
from ropewalk.clean.duplicates.spill import Spill
from ropewalk.clean.step import Parts, Texts


def folded(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())


def digests(texts: Sequence[str]) -> np.ndarray:
    """[n, 2] uint64: 128 bits of BLAKE2b (RFC 7693). Two different texts among a billion have the same with
    probability 1e-21, and none can be made to."""
    joined = b"".join([blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts])
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class ExactDuplicates:
    """Texts equal letter by letter or, where `normalized`, but for case and white space."""

    normalized: bool = False

    name: ClassVar[str] = "exact_duplicates"
    version: ClassVar[int] = 1
    attributes: ClassVar[Mapping[str, str]] = {
        "exact_duplicate_of": "number of the row with the same text that is kept, -1 where it is this one",
        "exact_duplicates": "how many rows have this text",
    }

    def settings(self) -> Any:
        return {"normalized": self.normalized}

    def map(self, texts: Texts) -> pa.Table:
        found = digests([folded(text) for text in texts.texts] if self.normalized else texts.texts)
        return pa.table({"key": found[:, 0], "check": found[:, 1]})

    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        rows = rows_of(parts)
        clusters = Clusters(len(rows))
        with Spill() as spill:
            for part in rows.parts:
                kept, rank = rows.kept[rows.of(part)], rows.rank[rows.of(part)]
                table = parts.mapped(part, ["key", "check"])
                spill.add(table["key"].to_numpy()[kept], table["check"].to_numpy()[kept], rank[kept])
            for order, first in spill.groups():
                clusters.join(first, order)
        yield from cluster_tables(rows, clusters, ("exact_duplicate_of", "exact_duplicates"))
