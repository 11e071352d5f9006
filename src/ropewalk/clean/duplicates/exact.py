"""Documents that are the same text."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from ropewalk.clean.duplicates.rows import Clusters, cluster_tables, rows_of
from ropewalk.clean.duplicates.spill import Spill
from ropewalk.clean.step import Joined, Parts, Texts


def digests(texts: Sequence[str]) -> np.ndarray:
    """[n, 2] uint64: 128 bits of BLAKE2b (RFC 7693). Two different texts among a billion have the same with
    probability 1e-21, and none can be made to."""
    joined = b"".join([blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts])
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


class ExactDuplicates(Joined):
    """Texts equal letter by letter."""

    name = "exact_duplicates"
    attributes: Mapping[str, str] = {
        "exact_duplicate_of": "number of the row with the same text that is kept, -1 where it is this one",
        "exact_duplicates": "how many rows have this text",
    }

    def map(self, texts: Texts) -> pa.Table:
        found = digests(texts.texts)
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
