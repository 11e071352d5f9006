"""Vectors of short texts, by which a light paraphrase can be told: without a model, or with one.

Anything that gives a row of length 1 for each text will do in their place.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ropewalk.clean.text_model import TextModel
from ropewalk.clean.words import mix

Vectors = Callable[[Sequence[str]], np.ndarray]
"""Texts to [texts, dimensions] float32, each row of length 1 (or 0, for a text of nothing)."""
_LENGTH = 4
_APART = re.compile(r"[\W_]+")


class CharacterNgrams:
    """How often runs of 4 letters occur in a text, hashed to `dimensions`, rare ones weighing more (TF-IDF).

    Insensitive to the order of words and to single other words; a synonym shares nothing. What is rare is
    learnt from the `examples` (the questions that will be looked for).
    """

    def __init__(self, examples: Sequence[str], dimensions: int = 2048) -> None:
        self.dimensions = dimensions
        self._weights = np.ones(dimensions, np.float32)
        seen = (self._counts(examples) > 0).sum(0) if examples else np.zeros(dimensions)
        self._weights = np.log((1 + len(examples)) / (1 + seen)).astype(np.float32) + 1

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.log1p(self._counts(texts)) * self._weights
        return _unit(vectors)

    def _counts(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, dimensions] float32."""
        plain = [_APART.sub(" ", f" {text.lower()}") for text in texts]
        codes = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), np.uint32)
        text = np.repeat(np.arange(len(texts)), [len(one) for one in plain])
        size = len(codes) - _LENGTH + 1
        if size <= 0:
            return np.zeros((len(texts), self.dimensions), np.float32)
        rolled = np.zeros(size, np.uint64)
        for k in range(_LENGTH):
            rolled = mix(rolled + codes[k : k + size].astype(np.uint64))
        inside = text[:size] == text[_LENGTH - 1 :]
        bucket = (rolled[inside] % np.uint64(self.dimensions)).astype(np.int64)
        place = text[:size][inside] * self.dimensions + bucket
        flat = np.bincount(place, minlength=len(texts) * self.dimensions)
        return flat.reshape(len(texts), self.dimensions).astype(np.float32)


class ModelVectors:
    """The mean of a language model's last hidden states over a text's first 512 tokens.

    Of fewer where the model has no room for them. `source` is as `load_model` takes it. Texts go through the
    model one by one, so that no vector depends on its neighbours. (A model that was trained for embeddings
    tells paraphrases far better than one that was not.)
    """

    def __init__(self, source: str) -> None:
        self._model = TextModel(source)

    def settings(self) -> Any:
        return self._model.fingerprint()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, 1), np.float32)
        import torch

        model, tokenizer = self._model.loaded
        means = []
        for text in texts:
            ids = tokenizer.encode(text)[: min(512, model.context_length)] or [0]
            tokens = torch.tensor([ids], device=model.output_weight.device)
            with torch.inference_mode():
                means.append(model(tokens)[0].float().mean(0).cpu().numpy())
        return _unit(np.stack(means))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-9)).astype(np.float32)
