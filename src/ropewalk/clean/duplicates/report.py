"""What the clusters of duplicates are: how many of which size, and the largest of them to look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.duplicates.jaccard import ShingleSets
from ropewalk.clean.step import Parts

LINE = 100
"""Characters of a text's first line that are shown."""


def cluster_report(
    parts: Parts,
    attributes: Sequence[pa.Table],
    column: str = "near_duplicate_of",
    clusters: int = 10,
    members: int = 5,
    words: int = 5,
) -> dict[str, Any]:
    """JSON-able: `rows`, `duplicates` (rows that are not kept), `clusters` (of two rows or more), `sizes`
    (size -> how many clusters) and `largest`: that many clusters with their first members, the kept one
    first. Of each member: its number through all parts, its part and place there, the beginning of its first
    line, and the Jaccard similarity of its runs of `words` words with the kept one's.

    `attributes` are what the step's `reduce` gave, a table for each part.
    """
    of = np.concatenate([np.empty(0, np.int64), *(table[column].to_numpy() for table in attributes)])
    duplicates = np.flatnonzero(of >= 0)
    kept, sizes = np.unique(of[duplicates], return_counts=True)
    sizes = sizes + 1
    histogram = np.unique(sizes, return_counts=True)
    largest = np.lexsort((kept, -sizes))[:clusters]
    # the first few of each, found without a pass over all rows for each cluster
    by_kept = duplicates[np.argsort(of[duplicates], kind="stable")]
    begins = np.cumsum(sizes - 1) - (sizes - 1)
    shown = [[kept[i], *by_kept[begins[i] :][: min(members, sizes[i]) - 1]] for i in largest]
    details = _members(parts, shown, words)
    return {
        "rows": len(of),
        "duplicates": len(duplicates),
        "clusters": len(kept),
        "sizes": {str(size): int(count) for size, count in zip(*histogram, strict=True)},
        "largest": [
            {"size": int(sizes[i]), "members": some} for i, some in zip(largest, details, strict=True)
        ],
    }


def _members(parts: Parts, shown: Sequence[Sequence[int]], words: int) -> list[list[dict[str, Any]]]:
    begins = np.concatenate([[0], np.cumsum(parts.sizes)])
    found = []
    for rows in shown:
        texts, places = [], []
        for row in rows:
            part = int(np.searchsorted(begins, row, side="right")) - 1
            places.append({"row": int(row), "part": part, "place": int(row - begins[part])})
            texts += parts.texts(part, np.array([row - begins[part]]))
        with ShingleSets(words) as sets:
            sets.add(texts)
            everyone = np.arange(len(texts))
            similarity = sets.similarities(np.zeros_like(everyone), everyone, 0.0)
        found.append(
            [
                {**place, "first_line": first_line(text), "similarity": round(float(value), 4)}
                for place, text, value in zip(places, texts, similarity, strict=True)
            ]
        )
    return found


def first_line(text: str) -> str:
    """The first line that is not blank, cut to LINE characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= LINE else line[: LINE - 1] + "…"


def cluster_lines(report: dict[str, Any]) -> list[str]:
    """The same for a terminal."""
    lines = ["{rows:,} rows, {duplicates:,} of them duplicates, in {clusters:,} clusters".format(**report)]
    for cluster in report["largest"]:
        lines.append(f"{cluster['size']:,} rows:")
        lines += [
            f"  {member['row']:>10}  {member['similarity']:.2f}  {member['first_line']}"
            for member in cluster["members"]
        ]
    return lines
