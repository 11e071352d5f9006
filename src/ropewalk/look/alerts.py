"""What in an account one should know before training on the data, in plain words, most important first."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ropewalk.look.figures import percent

Level = Literal["problem", "warning", "note"]
LEVELS: Mapping[Level, int] = {"problem": 0, "warning": 1, "note": 2}


class Alert(NamedTuple):
    """`weight`, 0 to 1, orders alerts of a level: how much of the data it is about."""

    level: Level
    weight: float
    text: str


def alerts(account: Mapping[str, Any]) -> list[dict[str, str]]:
    """[{level, text}]."""
    checks: tuple[Callable[[Mapping[str, Any]], Iterator[Alert]], ...] = (
        _validation, _rules, _duplicates, _repeats, _sources, _attributes, _characters, _rows, _scored,
        _losses,
    )  # fmt: skip
    found = [alert for check in checks for alert in check(account)]
    found.sort(key=lambda alert: (LEVELS[alert.level], -alert.weight, alert.text))
    notes = [Alert("note", 0.0, f"{note}.") for note in account["notes"] if "equal an earlier" not in note]
    notes = [note for note in notes if "validation rows are also" not in note.text]
    return [{"level": alert.level, "text": alert.text} for alert in [*found, *notes]]


def _validation(account: Mapping[str, Any]) -> Iterator[Alert]:
    if not account["splits"]["validation"]:
        yield Alert(
            "problem", 1.0, "There is no validation data: set data.validation or data.validation_fraction."
        )
        return
    leaked = account["duplicates"]["in_validation_and_training"]
    validation = sum(f["documents"] for f in account["fate"] if f["what"] == "validation")
    if leaked:
        share = leaked / max(validation, 1)
        text = f"{share:.1%} of the validation documents ({leaked:,}) are also in training, word for word."
        yield Alert("problem", share, text)
    if 0 < validation < 20:
        are = "is" if validation == 1 else "are"
        text = f"There {are} only {_count(validation, 'validation document')}."
        yield Alert("warning", 0.5, text)


def _rules(account: Mapping[str, Any]) -> Iterator[Alert]:
    for rule in account["rules"]:
        for source in account["sources"]:
            dropped = rule["sources"].get(source["name"], 0)
            share = dropped / max(source["documents"], 1)
            if share >= 0.3 and dropped >= 5:
                level: Level = "problem" if share >= 0.8 else "warning"
                text = f"The rule {rule['rule']} drops {share:.0%} of {source['name']}: {rule['reason']}."
                yield Alert(level, share, text)
    dropped = sum(rule["dropped"] for rule in account["rules"])
    if account["rules"] and dropped > account["documents"] / 2:
        share = dropped / account["documents"]
        yield Alert("problem", share, f"The rules drop {share:.0%} of all documents.")
    idle = [rule["rule"] for rule in account["rules"] if not rule["failed"]]
    if idle:
        yield Alert(
            "note",
            0.0,
            f"{_count(len(idle), 'rule')} {'has' if len(idle) == 1 else 'have'} no effect: {_some(idle)}.",
        )


def _duplicates(account: Mapping[str, Any]) -> Iterator[Alert]:
    for source in account["sources"]:
        share = source["again"] / max(source["kept"], 1)
        if share >= 0.01:
            text = (
                f"{percent(share, 1)} of the documents of {source['name']} that are trained on "
                f"({source['again']:,}) equal an earlier one: data.clean.duplicates=[exact] leaves them out."
            )
            yield Alert("problem" if share >= 0.1 else "warning", share, text)
    same = [cluster for cluster in account["duplicates"]["clusters"] if cluster["kept"] >= 10]
    for cluster in same[:1]:
        kept, share = cluster["kept"], cluster["kept"] / max(account["kept"], 1)
        if share >= 0.001 and cluster["exact"]:
            text = f"One document is there {kept:,} times: {_quoted(cluster['samples'][0]['text'])}"
            yield Alert("warning", share, text)


def _repeats(account: Mapping[str, Any]) -> Iterator[Alert]:
    lines = account["lines"]
    for line in lines["top"]:
        share = line["count"] / lines["total"]
        # A closing bracket or a fence of code is no boilerplate.
        if share >= 0.005 and line["count"] >= 20 and sum(c.isalnum() for c in line["text"]) >= 8:
            yield Alert(
                "warning", share, f"One line makes up {share:.1%} of all lines: {_quoted(line['text'])}"
            )
    for source in account["sources"]:
        for line in source["lines"]:
            share = line["count"] / max(source["kept"], 1)
            # As many letters as a sentence has: headings are in many documents, and should be.
            if share >= 0.2 and line["count"] >= 20 and sum(c.isalnum() for c in line["text"]) >= 24:
                text = (
                    f"One line is {line['count']:,} times in the {source['kept']:,} documents of "
                    f"{source['name']}: {_quoted(line['text'])}"
                )
                yield Alert("warning", min(share, 1.0) / 2, text)
    kept = max(account["kept"], 1)
    for ngram in account["ngrams"]["top"][:3]:
        share = ngram["count"] / kept
        if share >= 0.05 and ngram["count"] >= 20:
            text = (
                f"The same {account['ngrams']['n']} words are there {ngram['count']:,} times, "
                f"{share:.2f} for each document: {_quoted(ngram['text'])}"
            )
            yield Alert("warning", min(share, 1.0) / 2, text)


def _sources(account: Mapping[str, Any]) -> Iterator[Alert]:
    total = sum(source["tokens"] for source in account["sources"])
    for source in account["sources"]:
        if not source["kept"]:
            yield Alert("problem", 1.0, f"Nothing of {source['name']} is kept.")
            continue
        median = source["tokens_a_document"]["median"]
        if median < 32:
            text = f"The median document of {source['name']} has {median:.0f} tokens."
            yield Alert("warning" if median < 12 else "note", source["tokens"] / max(total, 1), text)
        share = source["tokens"] / max(total, 1)
        if share >= 0.8 and len([s for s in account["sources"] if not s["held_out"]]) > 1:
            yield Alert("warning", share / 2, f"{source['name']} is {share:.0%} of all tokens.")


def _attributes(account: Mapping[str, Any]) -> Iterator[Alert]:
    for values in account["values"]:
        total = sum(values["kept"].values())
        if values["name"] == "language" and total:
            shares = {name: n / total for name, n in values["kept"].items()}
            first, *others = sorted(shares.items(), key=lambda item: -item[1])
            if first[1] < 0.95 and others:
                said = ", ".join(f"{name} {share:.0%}" for name, share in [first, *others[:3]])
                yield Alert("warning", 1 - first[1], f"The language is mixed: {said}.")
    edited = {edit["kind"] for edit in account["edits"]}
    for places in account["places"]:
        left = places["kept"]
        kinds = {kind: n for kind, n in left["kinds"].items() if kind not in edited}
        if kinds:
            said = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda i: -i[1])[:4])
            share = left["documents"] / max(account["kept"], 1)
            where = f"{percent(share, 1)} of the documents that are kept"
            text = f"{places['name']}: found in {where}, and left as it is ({said})."
            yield Alert("warning" if share >= 0.01 else "note", share, text)


def _characters(account: Mapping[str, Any]) -> Iterator[Alert]:
    said = {
        "mojibake": "mojibake (Ã¤ for ä): data.clean.repair=true undoes it.",
        "replacement": "the sign for a lost character (\ufffd).",
    }
    for name, what in said.items():
        rest = account["wrong"][name]
        for source in account["sources"]:
            share = source[name] / max(source["kept"], 1)
            if share >= 0.005:
                rest -= source[name]
                text = f"{percent(share, 1)} of the documents of {source['name']} have {what}"
                yield Alert("warning", share, text)
        if rest:
            text = f"{_count(rest, 'document')} {'has' if rest == 1 else 'have'} {what}"
            yield Alert("note", rest / max(account["kept"], 1), text)


def _rows(account: Mapping[str, Any]) -> Iterator[Alert]:
    train, packing = account["splits"]["train"], account["packing"]
    filled = train["packing_efficiency"].get(packing)
    if filled is not None and filled < 0.8:
        hint = " data.packing=best_fit puts several documents in a row." if packing == "none" else ""
        text = f"{1 - filled:.0%} of every row will be padding with packing={packing}.{hint}"
        yield Alert("problem" if filled < 0.5 else "warning", 1 - filled, text)
    rows = train["rows"].get(packing)
    if rows is not None and rows < 100:
        yield Alert(
            "warning",
            0.3,
            f"Training has only {_count(rows, 'row')} of {account['sequence_length']:,} tokens.",
        )
    longer = account["lengths"]["longer_than_a_row"]
    share = longer / max(account["kept"], 1)
    if share >= 0.05:
        text = f"{share:.0%} of the documents are longer than a row of {account['sequence_length']:,} tokens."
        yield Alert("note", share, text)


def _scored(account: Mapping[str, Any]) -> Iterator[Alert]:
    for source in account["sources"]:
        share = source["scored"] / max(source["tokens"], 1)
        if source["tokens"] and share < 0.15:
            text = f"Only {share:.0%} of the tokens of {source['name']} are scored."
            yield Alert("warning", 1 - share, text)


def _losses(account: Mapping[str, Any]) -> Iterator[Alert]:
    if account["skipped"]["count"]:
        text = f"{_count(account['skipped']['count'], 'bad row')} skipped: report.md names them."
        yield Alert("warning", 0.1, text)
    if account["truncated_tokens"]:
        share = account["truncated_tokens"] / (
            account["truncated_tokens"] + account["splits"]["train"]["tokens"]
        )
        yield Alert("warning", share, f"{share:.1%} of all tokens were cut off at the end of documents.")
    for what, done in account["changed"].items():
        if what.startswith("left out"):
            share = done["count"] / max(account["documents"], 1)
            level: Level = "warning" if share >= 0.01 else "note"
            yield Alert(level, share, f"{_count(done['count'], 'document')} {what}.")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f"“{text[:100]}…”" if len(text) > 100 else f"“{text}”"
