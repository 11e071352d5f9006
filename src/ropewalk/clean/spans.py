"""Places in texts as an Arrow column."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import SPANS


def spans_of(
    texts: int,
    document: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    kinds: np.ndarray,
    names: Sequence[str],
) -> pa.Array:
    """[texts] SPANS of places that are in order: text `document`, characters `starts` to `ends` of it, and
    kind names[kinds]; all [n] integers."""
    kind = pa.DictionaryArray.from_arrays(pa.array(kinds, pa.int32()), pa.array(names, pa.string()))
    values = pa.StructArray.from_arrays(
        [pa.array(starts, pa.int32()), pa.array(ends, pa.int32()), kind.cast(pa.string())],
        fields=list(SPANS.value_type),
    )
    offsets = np.searchsorted(document, np.arange(texts + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=SPANS)
