"""What became of the data: counted while it is prepared, kept as a dictionary, written as report.md."""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ropewalk.data.encode import Account
from ropewalk.data.packing import rows_needed
from ropewalk.data.records import BadRow
from ropewalk.data.tokenize import Tokens

SAMPLES = 5
_SHOWN = 20
_PACKINGS = {
    "best_fit": "rows packed best-fit",
    "none": "one document a row",
    "concat": "documents end to end",
}
_SAMPLE_CHARACTERS = 2000


@dataclass
class SplitTally:
    """Documents of one split."""

    lengths: array = field(default_factory=lambda: array("q"))
    scored: int = 0
    sources: dict[str, Counter] = field(default_factory=dict)
    hashes: array = field(default_factory=lambda: array("Q"))
    """of the contents of the records"""

    def add(self, source: str, tokens: Tokens) -> None:
        length, scored = len(tokens.ids), int(np.count_nonzero(tokens.scored))
        self.lengths.append(length)
        self.scored += scored
        counter = self.sources.setdefault(source, Counter())
        for name, count in (("documents", 1), ("tokens", length), ("scored", scored)):
            counter[name] += count

    def report(self, sequence_length: int) -> dict[str, Any]:
        lengths = np.array(self.lengths, dtype=np.int64)
        tokens = int(lengths.sum())
        rows = rows_needed(lengths, sequence_length)
        edges = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
        counts = np.histogram(lengths, bins=edges)[0].tolist()
        low, middle, high, top = np.percentile(lengths, [0, 50, 95, 100], method="lower").tolist()
        return {
            "documents": len(lengths),
            "tokens": tokens,
            "scored": self.scored,
            "scored_share": self.scored / tokens,
            "lengths": {"min": low, "median": middle, "p95": high, "max": top},
            "histogram": [
                {"from": int(a), "to": min(int(b) - 1, top), "documents": n}
                for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
                if n
            ],
            "sources": {name: dict(counter) for name, counter in self.sources.items()},
            "rows": rows,
            "packing_efficiency": {name: tokens / (n * sequence_length) for name, n in rows.items()},
        }


@dataclass
class Tally:
    """Everything that is counted in one preparation."""

    train: SplitTally = field(default_factory=SplitTally)
    validation: SplitTally = field(default_factory=SplitTally)
    account: Account = field(default_factory=Account)
    """of all units together"""
    skipped: list[BadRow] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    """rule -> documents of which it is the verdict"""
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[int, str, Tokens]] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, SplitTally]:
        return {"train": self.train, "validation": self.validation}

    def document(self, train: bool, content_hash: int, id: str, tokens: Tokens) -> None:
        """One that is kept. Shows those for training with the highest hashes: as good as random, and always
        the same."""
        self.splits["train" if train else "validation"].hashes.append(content_hash)
        if train and (len(self.samples) < SAMPLES or content_hash > self.samples[0][0]):
            copied = Tokens(tokens.ids.copy(), tokens.scored.copy())
            heapq.heappush(self.samples, (content_hash, id, copied))
            if len(self.samples) > SAMPLES:
                heapq.heappop(self.samples)

    def report(self, tokenizer: Any, sequence_length: int) -> dict[str, Any]:
        """The whole account, JSON-able."""
        validation = self.validation.report(sequence_length) if self.validation.lengths else None
        account = self.account
        return {
            "sequence_length": sequence_length,
            "read": dict(account.kinds),
            "train": self.train.report(sequence_length),
            "validation": validation,
            "skipped": {"count": len(self.skipped), "rows": [str(row) for row in self.skipped]},
            "changed": {
                what: {"count": account.changes[what], "rows": where}
                for what, where in account.changed.items()
            },
            "truncated_tokens": account.truncated_tokens,
            "notes": [*self.notes, *self._found()],
            "samples": [
                {"id": id, "text": show(tokens, tokenizer)}
                for _, id, tokens in sorted(self.samples, reverse=True)
            ],
        }

    def _found(self) -> Iterable[str]:
        endless = self.account.turns_without_end
        if endless:
            yield (
                f"{endless:,} assistant turns end without a special token in this chat "
                "template: nothing that would end an answer is learned from them"
            )
        train, validation = (np.array(s.hashes, dtype=np.uint64) for s in (self.train, self.validation))
        unique = np.unique(train)
        if len(unique) < len(train):
            yield f"{len(train) - len(unique):,} of {len(train):,} training rows equal an earlier one"
        common = int(np.isin(validation, unique).sum())
        if common:
            yield f"{common:,} of {len(validation):,} validation rows are also training rows"


def show(tokens: Tokens, tokenizer: Any) -> str:
    """The text of the tokens with what is scored between ⟦ and ⟧; of a long one the beginning and the end."""
    edges = [0, *(np.flatnonzero(np.diff(tokens.scored)) + 1).tolist(), len(tokens.ids)]
    parts = []
    for a, b in pairwise(edges):
        text = tokenizer.decode(
            tokens.ids[a:b].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if len(text) > _SAMPLE_CHARACTERS:
            half = _SAMPLE_CHARACTERS // 2
            text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
        parts.append(f"⟦{text}⟧" if tokens.scored[a] else text)
    return "".join(parts)


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    read = ", ".join(f"{count:,} {kind}" for kind, count in report["read"].items())
    lines = ["# Prepared data", "", f"Read: {read}. Rows of {report['sequence_length']:,} tokens.", ""]
    splits = {name: report[name] for name in ("train", "validation") if report[name]}
    packings = [name for name in _PACKINGS if all(name in split["rows"] for split in splits.values())]
    titles = "".join(f" {_PACKINGS[name]} (filled) |" for name in packings)
    lines += [f"| | documents | tokens | scored |{titles}", "|---|---|---|---|" + "---|" * len(packings)]
    for name, split in splits.items():
        rows = " | ".join(
            f"{split['rows'][packing]:,} ({split['packing_efficiency'][packing]:.1%})" for packing in packings
        )
        lines += [_row(name, split) + f" {rows} |"]
    if not report["validation"]:
        lines += ["", "There is no validation data."]
    for name, split in splits.items():
        lines += [
            "",
            f"## {name.capitalize()}",
            "",
            "| source | documents | tokens | scored |",
            "|---|---|---|---|",
        ]
        lines += [
            _row(source, {**counts, "scored_share": counts["scored"] / counts["tokens"]})
            for source, counts in split["sources"].items()
        ]
        lengths = split["lengths"]
        lines += ["", "Tokens in a document: " + ", ".join(f"{k} {v:,}" for k, v in lengths.items()) + "."]
        lines += ["", "```", *_bars(split["histogram"]), "```"]
    if "cleaning" in report:
        lines += ["", "## Cleaning", "", *_cleaning(report["cleaning"])]
    lines += ["", "## Changed and left out", ""]
    if report["truncated_tokens"]:
        lines += [f"- {report['truncated_tokens']:,} tokens were cut off."]
    for what, done in report["changed"].items():
        lines += _named(what, done)
    lines += _named("skipped as bad rows", report["skipped"]) if report["skipped"]["count"] else []
    if not (report["changed"] or report["skipped"]["count"]):
        lines += ["Nothing."]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}." for note in report["notes"])]
    lines += ["", "## Samples", "", "What is scored stands between ⟦ and ⟧."]
    for sample in report["samples"]:
        fence = "```"
        while fence in sample["text"]:
            fence += "`"
        lines += ["", f"`{sample['id']}`", "", fence, sample["text"], fence]
    return "\n".join(lines) + "\n"


def _row(name: str, counts: dict[str, Any]) -> str:
    share = f"{counts['scored']:,} ({counts['scored_share']:.1%})"
    return f"| {name} | {counts['documents']:,} | {counts['tokens']:,} | {share} |"


def _cleaning(cleaning: dict[str, Any]) -> list[str]:
    count, kept = cleaning["documents"], cleaning["kept"]
    lines = [f"{kept:,} of {count:,} documents are kept. A document is dropped by the first rule it fails."]
    lines += ["", "| rule | keeps | dropped | failed | failed alone |", "|---|---|---|---|---|"]
    for rule in cleaning["rules"]:
        numbers = " | ".join(f"{rule[name]:,}" for name in ("dropped", "failed", "failed_alone"))
        lines.append(f"| {rule['rule']} | `{rule['keeps'].replace('|', chr(92) + '|')}` | {numbers} |")
    return lines


def _bars(histogram: list[dict[str, int]]) -> list[str]:
    most = max(bin["documents"] for bin in histogram)
    return [
        f"{bin['from']:>9,} - {bin['to']:<9,} {'█' * -(-40 * bin['documents'] // most)} {bin['documents']:,}"
        for bin in histogram
    ]


def _named(what: str, done: dict[str, Any]) -> list[str]:
    lines = [f"- {done['count']:,} rows {what}:"]
    lines += [f"  - {where}" for where in done["rows"][:_SHOWN]]
    if done["count"] > _SHOWN:
        lines += [f"  - and {done['count'] - _SHOWN:,} more"]
    return lines
