"""What a cleaning step is: it looks at texts and says attributes. It never changes or drops a text.

Most steps only `map`: what they say of a text depends on that text. A step that compares texts with each
other also has `reduce`, which sees what its `map` wrote of all parts of the data. What is kept is decided
elsewhere, by expressions over the attributes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ropewalk.clean.lines import Lines, lines_of
from ropewalk.clean.words import Words, words_of

SPANS = pa.list_(pa.struct({"start": pa.int32(), "end": pa.int32(), "kind": pa.string()}))
"""Type of an attribute that names places: characters start to end of a text, in order, none in two."""


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


class Texts:
    """A batch of texts, with what several steps need computed once. Batches have at most some MB.

    `names` are the documents' ids, which end in the file's name and a line: for its extension.
    """

    def __init__(self, texts: Sequence[str], names: Sequence[str] | None = None) -> None:
        self.texts = texts
        self.names = names if names is not None else [""] * len(texts)

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def words(self) -> Words:
        return words_of(self.texts)

    @cached_property
    def lines(self) -> Lines:
        return lines_of(self.words)


class Step(ABC):
    """`attributes` is name -> one line that says what it is, with its unit. `settings`, JSON-able, and
    `version` are all that the result depends on, apart from the texts."""

    version = 1

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def attributes(self) -> Mapping[str, str]: ...

    def settings(self) -> Any:
        return None

    @abstractmethod
    def map(self, texts: Texts) -> pa.Table:
        """One row for each text, in order; the same whatever else is in the batch."""


class Parts(Protocol):
    """All parts of the data, in their order, as a step's `reduce` sees them. Part i has sizes[i] texts."""

    @property
    def sizes(self) -> Sequence[int]: ...

    def mapped(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """What `map` wrote of a part. Read again each time: keep what must be kept, and little."""

    def kept(self, part: int) -> np.ndarray:
        """[sizes[part]] bool: what no rule has dropped yet."""

    def preference(self, part: int) -> np.ndarray:
        """[sizes[part]] float64: of two equals the one with the lower is kept, the earlier where they tie."""

    def texts(self, part: int, rows: np.ndarray) -> list[str]:
        """Some texts of a part: for checking candidates."""


class Joined(Step):
    """A step that compares texts with each other."""

    @abstractmethod
    def reduce(self, parts: Parts) -> Iterator[pa.Table]:
        """The attributes of each part in turn, a row for each text; memory is not that of the texts."""
