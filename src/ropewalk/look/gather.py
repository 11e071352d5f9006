"""The account of prepared data, JSON-able: what profile.json holds, and what the page and the alerts are
made of."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ropewalk.clean.rules import columns_of
from ropewalk.data.view import View
from ropewalk.look.duplicates import Duplicates
from ropewalk.look.samples import Place, Wanted, reasons
from ropewalk.look.sketch import Frequent, Quantiles, octaves
from ropewalk.look.thresholds import thresholds
from ropewalk.look.total import Numbers, Total
from ropewalk.look.unit import NGRAM, ProfileUnit

FORMAT = 1
BINS = 40
REPEATED = 15
"""Lines and n-grams that are shown."""


def gather(view: View, tasks: Sequence[ProfileUnit], packing: str) -> dict[str, Any]:
    """`view` is of prepared data; `tasks`, one for each of its parts, are done; `packing`: see the recipe."""
    assert view.report is not None
    everything, sources = Total(), {part.source: Total() for part in view.parts}
    for i, (part, task) in enumerate(zip(view.parts, tasks, strict=True)):
        account = json.loads(task.path.read_text(encoding="utf-8"))
        everything.add(i, account)
        sources[part.source].add(i, account)
    duplicates, wanted = Duplicates.of(view), Wanted(view)
    report, limits = view.report, _limits(view)
    found = {
        "format": FORMAT,
        "folder": view.folder.name if view.folder else "",
        "packing": packing,
        "sequence_length": report["sequence_length"],
        "documents": everything.documents,
        "kept": int(duplicates.kept.sum()),
        "fate": _fate(view, everything, duplicates, report),
        "splits": {name: report[name] for name in ("train", "validation")},
        "changed": report["changed"],
        "skipped": report["skipped"],
        "truncated_tokens": report["truncated_tokens"],
        "notes": report["notes"],
        "sources": _sources(view, sources, duplicates, report),
        "lengths": _lengths(view, duplicates, report["sequence_length"]),
        "characters": everything.characters.summary(),
        "words": everything.word_counts.summary(),
        "rules": [_rule(view, rule, everything, sources, wanted) for rule in view.rules],
        "attributes": [
            _attribute(view, name, numbers, limits.get(name, ()), wanted)
            for name, numbers in everything.numbers.items()
            if not name.endswith("duplicate_of")
        ],
        "values": [
            {"name": name, "what": view.attributes.get(name, ""), **{k: dict(v) for k, v in counts.items()}}
            for name, counts in everything.words.items()
        ],
        "places": [
            {
                "name": name,
                "what": view.attributes.get(name, ""),
                **vars(found["read"]),
                "kept": vars(found["kept"]),
            }
            for name, found in everything.places.items()
        ],
        "lines": _repeated(everything.lines),
        "ngrams": {"n": NGRAM, **_repeated(everything.ngrams, apart=True)},
        "duplicates": {
            "again": int(duplicates.again.sum()),
            "in_validation_and_training": duplicates.leaked(),
            "clusters": [_cluster(view, cluster, wanted) for cluster in duplicates.clusters()],
        },
        "wrong": {**everything.wrong, "samples": [wanted.sample(*place) for place in everything.mojibake]},
        "edits": [_edit(what, found, wanted) for what, found in sorted(everything.edits.items())],
        "samples": report["samples"],
    }
    wanted.read()
    return found


def _fate(
    view: View, everything: Total, duplicates: Duplicates, report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What became of all documents that were read: the parts add up to them."""
    kept, held_out = duplicates.kept, duplicates.held_out
    fate = [
        {"what": "training", "documents": int((kept & ~held_out).sum())},
        {"what": "validation", "documents": int((kept & held_out).sum())},
    ]
    dropped = [
        {"what": f"dropped by {rule}", "documents": n} for rule, n in everything.dropped.most_common() if n
    ]
    rest = everything.documents - int(kept.sum()) - everything.dropped.total()
    return [
        *fate,
        *dropped,
        {"what": "left out: empty, too long or without scored tokens", "documents": rest},
    ]


def _sources(
    view: View, sources: Mapping[str, Total], duplicates: Duplicates, report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    kept, again = (duplicates.by_part(view, which) for which in (duplicates.kept, duplicates.again))
    result = []
    for name, total in sources.items():
        here = [i for i, part in enumerate(view.parts) if part.source == name]
        counts = [s["sources"].get(name, {}) for s in (report["train"], report["validation"]) if s]
        tokens = Quantiles()
        for i in here:
            tokens.add(_tokens(view, duplicates, i))
        result.append(
            {
                "name": name,
                "held_out": any(view.parts[i].held_out for i in here),
                "documents": total.documents,
                "kept": sum(kept[i] for i in here),
                "dropped": dict(total.dropped),
                "again": sum(again[i] for i in here),
                "tokens": sum(c.get("tokens", 0) for c in counts),
                "scored": sum(c.get("scored", 0) for c in counts),
                "tokens_a_document": tokens.summary(),
                "histogram": _octaves(tokens),
                "characters": total.characters.summary(),
                "lines": _repeated(total.lines)["top"][:5],
                **total.wrong,
            }
        )
    return result


def _tokens(view: View, duplicates: Duplicates, i: int) -> np.ndarray:
    rows = slice(*view.begins[i : i + 2].tolist())
    return view.tokens[rows][duplicates.kept[rows]]


def _lengths(view: View, duplicates: Duplicates, sequence_length: int) -> dict[str, Any]:
    """Tokens a document, a split's pieces together."""
    found = {}
    for name, which in (("train", ~duplicates.held_out), ("validation", duplicates.held_out)):
        tokens = Quantiles()
        tokens.add(view.tokens[duplicates.kept & which])
        if tokens.count:
            found[name] = {**tokens.summary(), "histogram": _octaves(tokens)}
    longer = int((view.tokens > sequence_length).sum())
    return {**found, "longer_than_a_row": longer}


def _octaves(tokens: Quantiles) -> dict[str, Any]:
    if not tokens.count:
        return {"edges": [], "counts": []}
    edges = octaves(max(tokens.min, 1), max(tokens.max, 1))
    return {"edges": edges.tolist(), "counts": tokens.histogram(edges)}


def _rule(
    view: View, rule: Mapping[str, Any], everything: Total, sources: Mapping[str, Total], wanted: Wanted
) -> dict[str, Any]:
    columns = sorted(columns_of(rule["keeps"]))
    samples = []
    for _, part, row in everything.dropped_rows.get(rule["rule"], ()):
        values = view.table(part, columns).slice(row, 1).to_pylist()[0] if columns else {}
        marks = partial(reasons, columns=columns, values=values)
        said = {
            name: len(value) if isinstance(value, list) else value
            for name, value in view.named(values).items()
        }
        samples.append(wanted.sample(part, row, marks, values=said))
    return {
        **rule,
        "sources": {name: total.dropped[rule["rule"]] for name, total in sources.items()},
        "samples": samples,
    }


def _limits(view: View) -> dict[str, list[dict[str, Any]]]:
    """Attribute -> the limits that rules set it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in view.rules:
        for name, values in thresholds(rule["keeps"]).items():
            found.setdefault(name, []).extend({"rule": rule["rule"], "value": value} for value in values)
    return found


def _attribute(
    view: View, name: str, numbers: Numbers, limits: Sequence[Mapping[str, Any]], wanted: Wanted
) -> dict[str, Any]:
    ends = {
        end: [wanted.sample(part, row, value=value) for value, part, row in getattr(numbers, end)]
        for end in ("low", "high")
    }
    constant = numbers.kept.min == numbers.kept.max
    return {
        "name": name,
        "what": view.attributes.get(name, ""),
        "limits": [*limits],
        "read": numbers.read.summary(),
        "kept": numbers.kept.summary(),
        "histogram": histogram(numbers, [limit["value"] for limit in limits]),
        **({"low": [], "high": []} if constant else ends),
    }


def histogram(numbers: Numbers, limits: Sequence[float]) -> dict[str, Any] | None:
    """{edges, log, read, kept, zeros}: on a logarithmic axis where the largest is far from the median. The
    first and the last bin have what lies beyond them. Where zeros would dwarf the rest they are left out, and
    counted in `zeros` (of those kept)."""
    read, kept = numbers.read, numbers.kept
    zeros = None
    if not (read.values is not None and len(read.values) <= BINS // 2) and read.zeros() > 0.3 * read.count:
        zeros = kept.zeros()
        read, kept = read.without_zeros(), kept.without_zeros()
    if not read.count:
        return None
    edges, log = _edges(read, limits)
    return {
        "edges": edges.tolist(),
        "log": log,
        "read": read.histogram(edges),
        "kept": kept.histogram(edges),
        "zeros": zeros,
        "below": bool(read.min < edges[0]),
        "above": bool(read.max > edges[-1]),
    }


def _edges(read: Quantiles, limits: Sequence[float]) -> tuple[np.ndarray, bool]:
    """(edges, whether they are logarithmic); the limits are among what is drawn."""
    low, middle, high = (read.quantile(share) or 0.0 for share in (0.005, 0.5, 0.995))
    if read.values is not None and all(v == int(v) for v in read.values) and read.max - read.min < BINS:
        return np.arange(read.min, read.max + 2), False
    if read.min >= 0 and middle > 0 and read.max > max(50 * middle, 10):
        inside = [limit for limit in limits if limit > 0]
        low = max(min([low, *inside]), middle / 1e3)
        return np.geomspace(low, max([read.max, *inside]) * 1.01, BINS + 1), True
    low, high = min([low, *limits]), max([high, *(limit * 1.1 for limit in limits)])
    return np.linspace(low, high if high > low else low + 1, BINS + 1), False


def _repeated(frequent: Frequent, apart: bool = False) -> dict[str, Any]:
    """`apart`: without those of which a part is in a more frequent one."""
    top: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    for text, count in frequent.top():
        words = text.casefold().split()
        runs = {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
        if not (apart and runs & seen):
            top.append({"text": text, "count": count})
        seen |= runs
    return {"total": frequent.total, "error": frequent.error, "top": top[:REPEATED]}


def _cluster(view: View, cluster: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    samples = [wanted.sample(*view.place(number)) for number in cluster["numbers"]]
    return {**{k: v for k, v in cluster.items() if k != "numbers"}, "samples": samples}


def _edit(what: str, found: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    action, _, kind = what.partition(" ")
    samples = [
        wanted.sample(part, row, partial(_place, start, end)) for part, row, start, end in found["rows"]
    ]
    return {"action": action, "kind": kind, **found, "rows": None, "samples": samples}


def _place(start: int, end: int, text: str) -> list[Place]:
    return [(start, end)]
