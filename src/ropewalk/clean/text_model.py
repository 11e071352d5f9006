"""A language model of the user's choice, by which texts are measured."""

from functools import cached_property
from typing import Any


class TextModel:
    """Loaded when the first text comes. `source` is what `model.load_model` takes."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fingerprint(self) -> Any:
        """JSON-able: equal for equal models, wherever they lie."""
        from ropewalk.model import resolve_source
        from ropewalk.model.source import source_fingerprint

        return source_fingerprint(resolve_source(self.source))

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: another process reads its own."""
        return {"source": self.source}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)"""
        from ropewalk.model import load_model, load_tokenizer

        return load_model(self.source).eval(), load_tokenizer(self.source)
