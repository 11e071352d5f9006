"""How well a tokenizer suits texts: tokens of a word, bytes of a token, by source and language.

Fertility is the mean number of tokens of a word, and its companion the share of words of more than one (Rust
et al. 2021, arXiv 2012.15613). Words are those of the cleaning steps (clean/words.py), and a token belongs
to every word that it has a part of. Of one text, bytes per token compare any two tokenizers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ropewalk.clean.language import Language
from ropewalk.clean.step import Texts
from ropewalk.data.parts import Progress
from ropewalk.data.readers import Source
from ropewalk.data.texts import batches_of

ALL = "all"


@dataclass
class Fertility:
    """Sums over the texts of one source in one language, and what follows from them."""

    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    words: int = 0
    word_tokens: int = 0
    """tokens that words take, each word's counted for itself"""
    split_words: int = 0
    """words of more than one token"""

    def __iadd__(self, other: "Fertility") -> "Fertility":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def tokens_per_word(self) -> float | None:
        return self.word_tokens / self.words if self.words else None

    @property
    def bytes_per_token(self) -> float | None:
        return self.bytes / self.tokens if self.tokens else None

    @property
    def split(self) -> float | None:
        """Share of the words that are split, 0 to 1."""
        return self.split_words / self.words if self.words else None

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("tokens_per_word", "bytes_per_token", "split")}
        return {**vars(self), **derived}


@dataclass(frozen=True)
class Suitability:
    """A tokenizer on all sources: `parts` by (source, language), the language None where nothing tells it."""

    tokenizer: str
    vocab_size: int
    unused: int
    """tokens of the vocabulary, special ones left out, that no text has"""
    parts: dict[tuple[str, str | None], Fertility] = field(default_factory=dict)

    @property
    def whole(self) -> Fertility:
        total = Fertility()
        for part in self.parts.values():
            total += part
        return total

    def rows(self) -> Iterator[tuple[str, str, Fertility]]:
        """(source, language, sums): everything first, then each source and language by its bytes."""
        yield ALL, ALL, self.whole
        if len(self.parts) > 1:
            for (source, language), part in sorted(self.parts.items(), key=lambda item: -item[1].bytes):
                yield source, language or "-", part

    def as_dict(self) -> dict[str, Any]:
        own = {"tokenizer": self.tokenizer, "vocab_size": self.vocab_size, "unused": self.unused}
        parts = [
            {"source": source, "language": language, **part.as_dict()}
            for (source, language), part in self.parts.items()
        ]
        return {**own, "all": self.whole.as_dict(), "parts": parts}


def fertility(
    tokenizers: Mapping[str, Any], sources: Sequence[Source], progress: Progress | None = None
) -> list[Suitability]:
    """Measures loaded tokenizers (name -> one of `load_tokenizer`) on the same texts, each read once.

    By language where a cleaning step says it. Special tokens that a tokenizer adds do not count.
    Raises UserError for a source that cannot be read or has no text.
    """
    step = Language()
    used = {name: np.zeros(_rows(tokenizer), bool) for name, tokenizer in tokenizers.items()}
    parts: dict[str, dict[tuple[str, str | None], Fertility]] = {name: {} for name in tokenizers}
    for source in sources:
        for batch in batches_of(source, progress):
            texts = Texts([record.plain for record in batch], [record.id for record in batch])
            languages = step.map(texts)["language"].to_pylist()
            for name, tokenizer in tokenizers.items():
                for language, found in zip(languages, _measure(tokenizer, texts, used[name]), strict=True):
                    part = parts[name].setdefault((source.name, language), Fertility())
                    part += found
    return [
        Suitability(name, len(tokenizer), _unused(tokenizer, used[name]), parts[name])
        for name, tokenizer in tokenizers.items()
    ]


def _measure(tokenizer: Any, texts: Texts, used: np.ndarray) -> Iterator[Fertility]:
    """Of each text; marks the tokens that are met in `used` [vocabulary]."""
    backend = tokenizer.backend_tokenizer
    words = texts.words.only
    encodings = backend.encode_batch(texts.texts, add_special_tokens=False)
    for i, (text, encoding) in enumerate(zip(texts.texts, encodings, strict=True)):
        used[encoding.ids] = True
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        own = slice(words.offsets[i], words.offsets[i + 1])
        starts, ends = (a[own] - words.begins[i] for a in (words.starts, words.ends))
        pieces = tokens_of_words(places, starts, ends)
        yield Fertility(
            texts=1,
            bytes=len(text.encode()),
            tokens=len(places),
            words=len(starts),
            word_tokens=int(pieces.sum()),
            split_words=int((pieces > 1).sum()),
        )


def tokens_of_words(places: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[words] int64: how many tokens have a part of each word.

    places [tokens, 2]: first and one after the last character of each token, both never falling (the tokens
    of the bytes of one character all have its place); starts, ends [words].
    """
    return np.searchsorted(places[:, 0], ends, "left") - np.searchsorted(places[:, 1], starts, "right")


def _rows(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _unused(tokenizer: Any, used: np.ndarray) -> int:
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return sum(not used[id] for id in tokenizer.get_vocab().values() if id not in special)


def table_rows(found: Sequence[Suitability]) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of a table in which tokenizers stand under each other for each source and language."""
    header = ["on", "language", "tokenizer", "tokens/word", "bytes/token", "words split", "tokens", "unused"]
    by_part: dict[tuple[str, str], list[tuple[Suitability, Fertility]]] = {}
    for one in found:
        for source, language, part in one.rows():
            by_part.setdefault((source, language), []).append((one, part))
    rows = [
        [
            source,
            language,
            one.tokenizer,
            part.tokens_per_word,
            part.bytes_per_token,
            None if part.split is None else f"{part.split:.1%}",
            f"{part.tokens:,}",
            f"{one.unused:,} of {one.vocab_size:,}" if source == ALL else "",
        ]
        for (source, language), pairs in by_part.items()
        for one, part in pairs
    ]
    return header, rows
