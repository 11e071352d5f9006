"""How an answer is compared with its reference. All scores are from 0 to 100, higher is better."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ropewalk.errors import UserError

_WORD = re.compile(r"[^\W_]+")


def exact_match(answer: str, reference: str) -> float:
    """100 if both are the same text: Unicode NFC, runs of white space as one space, none at the ends.

    Case and punctuation count.
    """
    return 100.0 * (_normalized(answer) == _normalized(reference))


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013).

    Words are runs of letters and digits in lower case, unstemmed: Google's `rouge_score` for English,
    but not limited to it.
    """
    a, b = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = _common_subsequence(a, b)
    return 200.0 * common / (len(a) + len(b)) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    previous = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
        previous = row
    return previous[-1]


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one sentence (Popović 2015, aclanthology.org/W15-3049), as sacrebleu computes it."""
    return float(_sacrebleu().sentence_score(answer, [reference]).score)


def _corpus_chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    return float(_sacrebleu().corpus_score(list(answers), [list(references)]).score)


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise UserError(
            "the metric chrf needs sacrebleu: pip install 'ropewalk[eval]', or choose other metrics"
        ) from error
    return CHRF()


_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "chrf": chrf,
    "rouge_l": rouge_l,
}


def score_row(metrics: Sequence[str], answer: str, reference: str) -> dict[str, float]:
    """Each of `metrics` for one answer. UserError for one that there is not."""
    for name in metrics:
        if name not in _METRICS:
            raise UserError(f"metric {name}: one of {', '.join(_METRICS)}")
    return {name: _METRICS[name](answer, reference) for name in metrics}


def score_corpus(
    metrics: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Each of `metrics` for all answers: the mean of the rows, but chrF from n-gram counts of the whole."""
    scores = {}
    for name in metrics:
        if name == "chrf":
            scores[name] = _corpus_chrf(answers, references)
        else:
            rows = [_METRICS[name](a, r) for a, r in zip(answers, references, strict=True)]
            scores[name] = sum(rows) / max(len(rows), 1)
    return scores
