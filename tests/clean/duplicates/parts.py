"""Texts cut into parts and batches, as the steps that compare texts see them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import Joined, Texts


class MemoryParts:
    """`sizes` texts in each part; what a step's `map` says of them is computed in batches of `batch`."""

    def __init__(
        self,
        step: Joined,
        texts: Sequence[str],
        sizes: Sequence[int] | None = None,
        batch: int = 64,
        kept: Sequence[bool] | None = None,
        preference: Sequence[float] | None = None,
    ) -> None:
        self.sizes = [len(texts)] if sizes is None else sizes
        assert sum(self.sizes) == len(texts)
        begins = np.concatenate([[0], np.cumsum(self.sizes)])
        self._slices = [slice(a, b) for a, b in pairwise(begins)]
        self._texts = list(texts)
        self._kept = np.ones(len(texts), bool) if kept is None else np.array(kept, bool)
        self._preference = np.zeros(len(texts)) if preference is None else np.array(preference, float)
        self._mapped = []
        for part in self._slices:
            here = self._texts[part]
            batches = [Texts(here[i : i + batch]) for i in range(0, len(here), batch)]
            tables = [step.map(some) for some in batches or [Texts([])]]
            self._mapped.append(pa.concat_tables(tables))

    def mapped(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self._mapped[part] if columns is None else self._mapped[part].select(list(columns))

    def kept(self, part: int) -> np.ndarray:
        return self._kept[self._slices[part]]

    def preference(self, part: int) -> np.ndarray:
        return self._preference[self._slices[part]]

    def texts(self, part: int, rows: np.ndarray) -> list[str]:
        here = self._texts[self._slices[part]]
        return [here[row] for row in rows]


def reduced(
    step: Joined, texts: Sequence[str], sizes: Sequence[int] | None = None, **more
) -> dict[str, list]:
    """The attributes of all texts, column by column."""
    parts = MemoryParts(step, texts, sizes, **more)
    tables = list(step.reduce(parts))
    assert [len(table) for table in tables] == list(parts.sizes)
    assert set(tables[0].column_names) == set(step.attributes)
    return pa.concat_tables(tables).to_pydict()
