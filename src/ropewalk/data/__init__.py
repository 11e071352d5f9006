"""Documents to batches. In: files of text and conversations, a tokenizer. Out: shards, a report, a `Loader`.

May import: recipe and model (in `prepare` only), files, errors; torch in batch and loader only.
"""

from ropewalk.data.batch import Batch
from ropewalk.data.entry import Prepared, judge, prepare
from ropewalk.data.loader import Loader, prefetch
from ropewalk.data.packing import pack
from ropewalk.data.shards import DamagedDataError, Document, ShardWriter, TokenShards
from ropewalk.data.tokenize import Tokenization, render, render_prompt
from ropewalk.data.view import View

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
