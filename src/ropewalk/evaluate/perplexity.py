"""Perplexity: how well a model foresees texts, each token scored once, with at least so much before it.

Long documents are read through a window that moves on by a stride. Documents never see each other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import RopewalkError, UserError
from ropewalk.evaluate.rows import read_records
from ropewalk.model import Transformer
from ropewalk.ops import linear_cross_entropy

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a forward pass, padding included."""


@dataclass(frozen=True)
class Score:
    """Sum of -ln p over the scored tokens, in nats, and how many tokens and UTF-8 bytes of text those are."""

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean nll of a token; depends on the tokenizer."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nll + other.nll, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class PerplexityResult(Score):
    """The figures of a file; `per_document` has those of each document, by `file:line` or file."""

    documents: int
    window: int
    stride: int
    per_document: tuple[tuple[str, Score], ...]

    def as_dict(self) -> dict[str, Any]:
        own = {"documents": self.documents, "window": self.window, "stride": self.stride, **_figures(self)}
        return {**own, "per_document": [{"id": name, **_figures(score)} for name, score in self.per_document]}


def _figures(score: Score) -> dict[str, Any]:
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "nll": score.nll,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def perplexity(
    model: Transformer,
    tokenizer: Any,
    path: str | Path,
    window: int,
    stride: int,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Figures for a text file (one document) or rows with `text` (a document each), as training data is read.

    The first token of a document is only context: a beginning-of-sequence token where the tokenizer puts
    one, else the text's own first token (its bytes do not count either). `progress(windows done, of)`.
    Raises UserError for unreadable files and a window that the model has no room for.
    """
    names, documents, sizes = [], [], []
    for name, text in read_documents(path):
        ids, size = encode(tokenizer, text)
        names.append(name)
        documents.append(ids)
        sizes.append(size)
    if not any(len(ids) > 1 for ids in documents):
        raise UserError(f"{path}: no text of two tokens or more to measure perplexity on")
    losses = score_documents(model, documents, window, stride, progress)
    scores = []
    for name, ids, size, nll in zip(names, documents, sizes, losses, strict=True):
        if not math.isfinite(nll):
            raise RopewalkError(
                f"{name}: the model's loss is {nll}; its weights are damaged, or overflow in this dtype"
            )
        scores.append(Score(nll, max(len(ids) - 1, 0), size))
    total = sum(scores, Score(0.0, 0, 0))
    return PerplexityResult(
        total.nll,
        total.tokens,
        total.bytes,
        len(scores),
        window,
        stride,
        tuple(zip(names, scores, strict=True)),
    )


def read_documents(path: str | Path) -> Iterator[tuple[str, str]]:
    """(`file:line` or file, text) of each document of a file."""
    for record in read_records(path):
        if record.text is None:
            raise UserError(f"{record.where}: perplexity needs text; this row is a conversation")
        yield record.where, record.text


def encode(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """Token ids, and the bytes of the text that is scored: all that comes after the first token."""
    encoding = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False, truncation=False
    )
    ids, special, offsets = (encoding[k] for k in ("input_ids", "special_tokens_mask", "offset_mapping"))
    while ids and special[-1]:  # an end that the tokenizer adds is not in the text
        ids, special = ids[:-1], special[:-1]
    unscored = 0 if not ids or special[0] else len(text[: offsets[0][1]].encode())
    return ids, len(text.encode()) - unscored


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first): tokens [begin, end) are read, and from them tokens [first, end] are foretold.

    Covers tokens 1 .. length-1 once each; every first but that of the first window has at least
    window - stride tokens before it.
    """
    begin, first = 0, 1
    while first < length:
        end = min(begin + window, length - 1)
        yield begin, end, first
        begin, first = begin + stride, end + 1


@torch.inference_mode()
def score_documents(
    model: Transformer,
    documents: Sequence[Sequence[int]],
    window: int,
    stride: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Sum of -ln p(token) in nats over all tokens but the first, for each document's token ids."""
    if not 1 <= stride <= window:
        raise UserError(f"stride is {stride}; it must be at least 1 and at most the window ({window})")
    context = model.context_length
    if window > context:
        raise UserError(f"window is {window} tokens; the model has room for {context}")
    device, training = model.embed.weight.device, model.training
    limit = BATCH_TOKENS[device.type]
    work = [(i, *place) for i, ids in enumerate(documents) for place in windows(len(ids), window, stride)]
    work.sort(key=lambda item: item[1] - item[2])  # longest first, like beside like
    losses = [0.0] * len(documents)
    model.eval()
    try:
        done = 0
        while done < len(work):
            longest = work[done][2] - work[done][1]
            batch = work[done : done + max(1, limit // longest)]
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, (i, begin, end, _) in enumerate(batch):
                tokens[row, : end - begin] = torch.tensor(documents[i][begin:end])
            hidden = model(tokens.to(device))  # padding is at the end, where a causal model does not look
            for row, (i, begin, end, first) in enumerate(batch):
                scored = hidden[row, first - 1 - begin : end - begin]
                labels = torch.tensor(documents[i][first : end + 1], device=device)
                losses[i] += float(_loss(model, scored, labels))
            done += len(batch)
            if progress is not None:
                progress(done, len(work))
    finally:
        model.train(training)
    return losses


def _loss(model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(
        hidden,
        model.output_weight,
        labels,
        bias=model.output_bias,
        softcap=model.config.final_logit_softcapping,
    )
