"""Scores on the rows of a task that the training data are not known to hold.

The account of contamination that `prepare` writes says of each evaluation set, known by its files' SHA-256,
which rows were found in the training data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.data.evaluation_sets import fingerprint
from ropewalk.errors import UserError
from ropewalk.evaluate.metrics import score_corpus
from ropewalk.files import read_json_object


@dataclass(frozen=True)
class CleanSubset:
    """`rows` were not found in the training data, `contaminated` (numbers from 0) were. `scores`, named
    METRIC_clean, are those of `rows`; empty where none is left."""

    scores: dict[str, float]
    rows: int
    contaminated: list[int]

    def as_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "rows": self.rows, "contaminated": self.contaminated}


def read_account(path: str | Path) -> dict[str, frozenset[int]]:
    """SHA-256 of a set's files -> numbers of its rows, from 0, that are in the training data.

    Raises UserError for what is no such account.
    """
    path = Path(path)
    sets = read_json_object(path).get("sets")
    if not isinstance(sets, dict):
        raise UserError(f"{path}: not an account of contamination: it has no sets")
    found: dict[str, frozenset[int]] = {}
    for name, own in sets.items():
        ids = own.get("contaminated") if isinstance(own, dict) else None
        if not isinstance(ids, list):
            raise UserError(f"{path}: set {name} does not say which items are contaminated")
        digest = own.get("sha256")
        if isinstance(digest, str):
            if not all(isinstance(id, str) and id.isascii() and id.isdigit() for id in ids):
                raise UserError(f"{path}: set {name}: contaminated must be numbers of rows, as text")
            found[digest] = found.get(digest, frozenset()) | {int(id) for id in ids}
    return found


def contaminated_rows(account: Mapping[str, frozenset[int]], path: str | Path) -> frozenset[int] | None:
    """Of a task's file; None where it is not among the sets that were looked for."""
    return account.get(fingerprint(path))


def clean_subset(
    metrics: Sequence[str], rows: Sequence[Mapping[str, Any]], contaminated: frozenset[int]
) -> CleanSubset:
    """`rows` are a task's, each with `answer` and `reference`, from the file's first row on."""
    clean = [row for i, row in enumerate(rows) if i not in contaminated]
    scores = {}
    if clean:
        answers, references = ([row[key] for row in clean] for key in ("answer", "reference"))
        scores = {f"{name}_clean": v for name, v in score_corpus(metrics, answers, references).items()}
    return CleanSubset(scores, len(clean), sorted(i for i in contaminated if i < len(rows)))
