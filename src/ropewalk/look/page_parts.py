"""The parts of the page that show documents: samples, rules what they drop, attributes with their ends."""

from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.look.charts import histogram
from ropewalk.look.html import Markup, bar, el, join, number, percent, table


def sample(entry: Mapping[str, Any], *more: Any) -> Markup:
    """A document's beginning with its marks; `more` stands beside its name."""
    text, parts, at = entry["text"], [], 0
    for start, end in entry["marks"]:
        parts += [text[at:start], el("mark", text[start:end])]
        at = end
    parts.append(text[at:])
    before = f"… {number(entry['before'])} characters before …\n" if entry["before"] else None
    after = f"\n… {number(entry['after'])} characters more" if entry["after"] else None
    muted = [part and el("span", part, class_="unscored") for part in (before, after)]
    name = [el("code", entry["id"]), *more]
    return el(
        "figure",
        el("figcaption", name),
        el("pre", muted[0], parts, muted[1], dir="auto"),
        class_="sample",
    )


def rules(account: Mapping[str, Any]) -> Markup | None:
    found = account["rules"]
    if not found:
        return None
    ordered = sorted(found, key=lambda rule: (-rule["dropped"], -rule["failed"]))
    acting = [rule for rule in ordered if rule["failed"]]
    idle = [rule["rule"] for rule in ordered if not rule["failed"]]
    said = (
        "A rule drops what fails it first of all; “failed” counts all that fail it, “alone” those that fail "
        "no other rule: what would come back without it."
    )
    quiet = el("p", "Without effect: ", ", ".join(idle), ".", class_="muted") if idle else None
    return join([el("p", said), [_rule(rule, account) for rule in acting], quiet])


def _rule(rule: Mapping[str, Any], account: Mapping[str, Any]) -> Markup:
    total = account["documents"]
    names = {"dropped": "dropped", "failed": "failed", "alone": "failed_alone"}
    counts = ", ".join(f"{name} {number(rule[key])}" for name, key in names.items())
    head = el(
        "summary",
        el("span", el("b", rule["rule"]), " ", el("span", rule["reason"], class_="muted")),
        bar(rule["dropped"], total, "drop"),
        el("span", counts, " · keeps ", el("code", rule["keeps"]), class_="counts"),
    )
    by_source = [
        (
            source["name"],
            rule["sources"][source["name"]],
            bar(rule["sources"][source["name"]], source["documents"], "drop"),
        )
        for source in account["sources"]
        if rule["sources"].get(source["name"])
    ]
    where = table(("source", "dropped", "share of the source"), by_source) if by_source else None
    samples = [sample(entry, *_said(entry["values"])) for entry in rule["samples"]]
    shown = samples or el("p", "What fails this rule has failed another before.", class_="muted")
    return el("details", head, where, shown, class_="rule")


def _said(values: Mapping[str, Any]) -> list[Any]:
    parts = []
    for name, value in values.items():
        value = number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        parts.append([" · ", name, " = ", el("b", "unknown" if value is None else value)])
    return parts


def attributes(account: Mapping[str, Any]) -> Markup | None:
    """Those that a rule asks for first, then in the order in which they were measured."""
    drawn = [attribute for attribute in account["attributes"] if attribute["histogram"]]
    if not drawn:
        return None
    ordered = sorted(drawn, key=lambda attribute: not attribute["limits"])
    read = account["documents"] > account["kept"]
    legend = [el("span", class_="legend"), "documents that no rule drops "] if read else []
    if read:
        legend += [el("span", class_="legend outline"), "all that were read "]
    if any(attribute["limits"] for attribute in drawn):
        legend += [el("span", class_="legend limit"), "limit of a rule"]
    first = sum(bool(attribute["limits"]) for attribute in ordered) or len(ordered)
    cards = [_attribute(attribute) for attribute in ordered]
    rest = [
        el("summary", f"{len(cards) - first} that no rule asks for"),
        el("div", cards[first:], class_="cards"),
    ]
    places = [
        (
            found["name"],
            found["documents"],
            percent(found["documents"], account["documents"]),
            _kinds(found["kinds"]),
        )
        for found in account["places"]
    ]
    listed = table(("places", "documents", "share", "what was found"), places) if places else None
    return join(
        [
            el("p", legend) if legend else None,
            listed,
            el("div", cards[:first], class_="cards"),
            el("details", rest) if cards[first:] else None,
        ]
    )


def _kinds(kinds: Mapping[str, int]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number(count)}" for name, count in ordered[:8])


def _attribute(attribute: Mapping[str, Any]) -> Markup:
    drawn, read, kept = attribute["histogram"], attribute["read"], attribute["kept"]
    differs = drawn["read"] != drawn["kept"]
    chart = histogram(
        attribute["name"],
        drawn["edges"],
        drawn["kept"],
        behind=drawn["read"] if differs else (),
        limits=[(limit["rule"], limit["value"]) for limit in attribute["limits"]],
        log=drawn["log"],
        below=drawn["below"],
        above=drawn["above"],
    )
    shown = kept if kept["count"] else read
    said = (
        f"median {number(shown['median'])}, 5% to 95%: {number(shown['p5'])} to {number(shown['p95'])}, "
        f"all: {number(shown['min'])} to {number(shown['max'])}"
    )
    if drawn["zeros"] is not None:
        said = f"0 in {percent(drawn['zeros'], kept['count'])} (not drawn); {said}"
    unknown = f"unknown of {number(read['unknown'])}" if read["unknown"] else None
    return el(
        "div",
        el("h3", attribute["name"]),
        el("p", attribute["what"], class_="muted"),
        chart,
        el("p", said, class_="muted"),
        el("p", unknown, class_="muted") if unknown else None,
        _ends(attribute),
        class_="card",
    )


def _ends(attribute: Mapping[str, Any]) -> Markup | None:
    parts = []
    for end, title in (("low", "lowest"), ("high", "highest")):
        entries: Sequence[Mapping[str, Any]] = attribute[end]
        if entries:
            said = number(entries[0]["value"])
            shown = [sample(entry, " · ", el("b", number(entry["value"]))) for entry in entries]
            parts.append(el("details", el("summary", f"The {title}: {said}"), shown))
    return join(parts) if parts else None


def edits(account: Mapping[str, Any]) -> Markup | None:
    found = account["edits"]
    if not found:
        return None
    done = {"cut": "cut out", "replace": "replaced", "mask": "not scored"}
    rows = [
        (
            entry["kind"],
            done.get(entry["action"], entry["action"]),
            entry["documents"],
            entry["places"],
            entry["characters"],
        )
        for entry in found
    ]
    samples = [
        el(
            "details",
            el("summary", f"{entry['kind']}: {done.get(entry['action'], entry['action'])}"),
            [sample(shown) for shown in entry["samples"]],
        )
        for entry in found
    ]
    return join([table(("what", "became", "documents", "places", "characters"), rows), samples])
