"""How well a model foresees a text: well where it has seen much like it, or where the text repeats itself."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ropewalk.clean.step import Step, Texts
from ropewalk.clean.text_model import TextModel
from ropewalk.errors import UserError

LONGEST_TOKEN = 16
"""Characters: text beyond so many for each token is not looked at."""


class Perplexity(Step):
    """Perplexity under a model of the user's choice, of the first tokens.

    Texts go through the model one by one: in a padded batch sums would be made in another order, and a text's
    value would depend, in its last digits, on its neighbours. `source` is what `model.load_model` takes.
    """

    name = "perplexity"

    def __init__(self, source: str | Path, tokens: int = 512) -> None:
        if tokens < 2:
            raise UserError(f"perplexity needs 2 tokens of a text or more; there are {tokens}")
        self.tokens, self._model = tokens, TextModel(str(source))

    @property
    def attributes(self) -> Mapping[str, str]:
        return {
            "perplexity": f"exp of the mean loss of tokens 2 to {self.tokens} (fewer where the model has no "
            "room for them), by the model's own tokenizer; null "
            "where there are fewer than two",
            "bits_per_byte": "the same loss in bits for a byte of UTF-8: comparable between tokenizers",
        }

    def settings(self) -> Any:
        return {"model": self._model.fingerprint(), "tokens": self.tokens}

    def map(self, texts: Texts) -> pa.Table:
        found = [self._score(text) for text in texts.texts]
        columns = np.array(found, dtype=np.float64).reshape(len(found), 2)
        # from_pandas: NaN is null
        values = [pa.array(column, pa.float64(), from_pandas=True) for column in columns.T]
        return pa.table(dict(zip(self.attributes, values, strict=True)))

    def _score(self, text: str) -> tuple[float, float]:
        """(perplexity, bits per byte), rounded to six digits."""
        from ropewalk.evaluate.perplexity import score_documents

        model, tokenizer = self._model.loaded
        count = min(self.tokens, model.context_length)
        text = text[: count * LONGEST_TOKEN].encode("utf-8", "replace").decode("utf-8")
        encoding = tokenizer(
            text,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
            truncation=False,
        )
        ids, special, offsets = (
            encoding[name][:count] for name in ("input_ids", "special_tokens_mask", "offset_mapping")
        )
        while ids and special[-1]:  # an end that the tokenizer adds is not in the text
            ids, special, offsets = ids[:-1], special[:-1], offsets[:-1]
        if len(ids) < 2:
            return math.nan, math.nan
        nats = score_documents(model, [ids], count, count)[0]
        size = len(text[0 if special[0] else offsets[0][1] : offsets[-1][1]].encode())
        perplexity = math.exp(min(nats / (len(ids) - 1), 700.0))
        return _rounded(perplexity), _rounded(nats / math.log(2) / size) if size else math.nan


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
