"""Documents to batches. In: files of text and conversations, a tokenizer. Out: shards, a report, a `Loader`.

May import: clean, recipe and model (in `prepare` only), files, errors; torch in batch and loader only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ropewalk.data.entry import Prepared, judge, prepare
from ropewalk.data.packing import pack
from ropewalk.data.shards import DamagedDataError, Document, ShardWriter, TokenShards
from ropewalk.data.tokenize import Tokenization, render, render_prompt
from ropewalk.data.view import View

if TYPE_CHECKING:
    from ropewalk.data.batch import Batch
    from ropewalk.data.loader import Loader, prefetch

__all__ = [
    "Batch",
    "DamagedDataError",
    "Document",
    "Loader",
    "Prepared",
    "ShardWriter",
    "TokenShards",
    "Tokenization",
    "View",
    "judge",
    "pack",
    "prefetch",
    "prepare",
    "render",
    "render_prompt",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: the processes that read and clean are started in a
    fraction of a second."""
    home = {"Batch": "batch", "Loader": "loader", "prefetch": "loader"}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
