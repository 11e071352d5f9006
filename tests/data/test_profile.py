"""The account of prepared data equals what plain Python counts, and its page shows texts as text."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from ropewalk.clean.rules import Rule
from ropewalk.data.cleaning import Plan
from ropewalk.errors import UserError
from ropewalk.look import profile
from ropewalk.look.charts import histogram
from ropewalk.look.html import environment
from ropewalk.look.page import page
from ropewalk.look.thresholds import thresholds
from ropewalk.look.unit import NGRAM

from .looked_at import FOOTER, Addresses, all_texts, prepared, words_in


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizers):
    """(folder of the input, prepared data, its account)."""
    folder = tmp_path_factory.mktemp("profile")
    found = prepared(folder, tokenizers["chatml"])
    return folder, found, profile(found.directory, workers=1)


@pytest.fixture(scope="module")
def kept(made):
    """(id, text as it is trained on) of what the two rules keep."""
    folder, _, _ = made
    texts = [(id, re.sub(r"\w+@\w+\.org", "<email>", text)) for id, text in all_texts(folder) if keeps(text)]
    assert 0 < len(texts) < len(all_texts(folder))
    return texts


def keeps(text):
    return 8 <= len(words_in(text)) <= 50


def test_documents_and_their_fate(made, kept):
    folder, _, account = made
    assert account["documents"] == len(all_texts(folder)) == sum(f["documents"] for f in account["fate"])
    assert account["kept"] == len(kept)
    for source in account["sources"]:
        here = [text for id, text in kept if id.startswith(source["name"])]
        assert source["kept"] == len(here)
        assert source["characters"]["median"] == sorted(map(len, here))[(len(here) + 1) // 2 - 1]


def test_tokens_are_those_of_the_shards(made):
    _, found, account = made
    lengths = np.concatenate([found.train.lengths, found.validation.lengths])
    assert sum(source["tokens"] for source in account["sources"]) == lengths.sum()
    assert (
        sum(source["scored"] for source in account["sources"]) == found.train.scored + found.validation.scored
    )
    pieces = Counter()
    for i in range(len(found.train)):
        one = found.train.document(i)
        pieces[one.id.split("#")[0]] += len(one.tokens)
    middle = np.quantile([*pieces.values()], 0.5, method="inverted_cdf")
    assert account["lengths"]["train"]["median"] == middle
    assert sum(account["lengths"]["train"]["histogram"]["counts"]) == len(pieces)


def test_attributes_of_what_was_read_and_of_what_is_kept(made, kept):
    folder, _, account = made
    (words,) = [a for a in account["attributes"] if a["name"] == "words"]
    counts = [len(words_in(text)) for _, text in all_texts(folder)]
    assert (words["read"]["min"], words["read"]["max"]) == (min(counts), max(counts))
    assert (words["kept"]["min"], words["kept"]["max"]) == (8, 50)
    assert sum(words["histogram"]["read"]) == len(counts)
    assert sum(words["histogram"]["kept"]) == len(kept)
    assert sorted((limit["rule"], limit["value"]) for limit in words["limits"]) == [
        ("long", 0), ("long", 50), ("short", 8),
    ]  # fmt: skip
    texts = dict(all_texts(folder))
    for end, expected in (("low", 8), ("high", 50)):
        for sample in words[end]:
            assert sample["value"] == len(words_in(texts[sample["id"]])) == expected
            assert texts[sample["id"]].startswith(sample["text"])


def test_attributes_of_other_types(made, kept):
    """Words are counted, places too; signatures are left alone."""
    folder, _, account = made
    texts = [text for _, text in all_texts(folder)]
    (values,) = account["values"]
    assert values["name"] == "language"
    assert values["read"] == Counter("xx" if text[0] == "S" else "en" for text in texts)
    assert values["kept"] == Counter("xx" if text[0] == "S" else "en" for _, text in kept)
    (places,) = account["places"]
    found = [len(re.findall(r"\w+@\w+\.org", text)) for text in texts]
    assert (places["documents"], places["places"]) == (sum(map(bool, found)), sum(found))
    assert places["kinds"] == {"email": sum(found)}
    share = values["kept"]["en"] / len(kept)
    said = f"The language is mixed: en {share:.0%}, xx {1 - share:.0%}."
    assert said in [alert["text"] for alert in account["alerts"]]


def test_rules_say_what_they_drop(made):
    folder, _, account = made
    texts = dict(all_texts(folder))
    for rule in account["rules"]:
        fails = {
            "short": lambda text: len(words_in(text)) < 8,
            "long": lambda text: len(words_in(text)) > 50 and len(text) >= 10,
        }[rule["rule"]]
        failing = [id for id, text in texts.items() if fails(text)]
        assert rule["failed"] == len(failing) > 0
        assert sum(rule["sources"].values()) == rule["dropped"]
        assert rule["samples"]
        for sample in rule["samples"]:
            assert sample["id"] in failing
            assert sample["values"]["words"] == len(words_in(texts[sample["id"]]))


def test_repeated_lines_and_runs_of_words(made, kept):
    _, _, account = made
    lines = Counter(line for _, text in kept for line in text.split("\n") if line.strip())
    assert account["lines"]["total"] == lines.total()
    assert account["lines"]["error"] == 0
    assert {e["text"]: e["count"] for e in account["lines"]["top"] if e["count"] > 1} == {
        line: n for line, n in lines.items() if n > 1
    }
    runs = Counter()
    for _, text in kept:
        words = [word.casefold() for word in words_in(text)]
        runs.update(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
    assert account["ngrams"]["total"] == runs.total()
    (_, most), *_ = runs.most_common(1)
    assert account["ngrams"]["top"][0]["count"] == most


def test_duplicates_and_what_is_wrong(made, kept):
    _, found, account = made
    copies = Counter(text for _, text in kept)
    same = {text: n for text, n in copies.items() if n > 1}
    assert len(same) == 2
    # Equal documents go to the same split; those of training are counted.
    again = sum(s["again"] for s in account["sources"])
    assert account["duplicates"]["again"] == again
    assert again in (sum(same.values()) - 2, *(n - 1 for n in same.values()))
    assert account["duplicates"]["in_validation_and_training"] == 0
    assert account["duplicates"]["clusters"][0]["documents"] == max(same.values())
    assert account["wrong"] == {"mojibake": 1, "replacement": 0, "samples": account["wrong"]["samples"]}
    assert [sample["id"] for sample in account["wrong"]["samples"]] == ["one.jsonl:202"]
    assert found.report["train"]


def test_edits_are_counted_and_shown_where_they_are(made):
    folder, _, account = made
    texts = [text for _, text in all_texts(folder) if keeps(text)]
    places = [m for text in texts for m in re.finditer(r"\w+@\w+\.org", text)]
    (edit,) = account["edits"]
    assert (edit["action"], edit["kind"]) == ("replace", "email")
    assert edit["documents"] == sum("@" in text for text in texts) > 0
    assert (edit["places"], edit["characters"]) == (len(places), sum(len(m.group()) for m in places))
    for sample in edit["samples"]:
        ((start, end),) = sample["marks"]
        assert re.fullmatch(r"\w+@\w+\.org", sample["text"][start:end])


def test_alerts_say_what_stands_out_the_worst_first(made):
    _, _, account = made
    levels = [alert["level"] for alert in account["alerts"]]
    assert levels == sorted(levels, key=["problem", "warning", "note"].index)
    said = "\n".join(alert["text"] for alert in account["alerts"])
    share = account["lines"]["top"][0]["count"] / account["lines"]["total"]
    assert f"One line makes up {share:.1%} of all lines: “{FOOTER}”" in said
    assert re.search(
        r"\d+% of the documents of one.jsonl that are trained on \(\d+\) equal an earlier one", said
    )
    assert "documents of one.jsonl have mojibake" in said


def test_alerts_without_validation_and_with_padding(tmp_path, tokenizers):
    found = prepared(tmp_path, tokenizers["chatml"], Plan(), validation_fraction=0.0, sequence_length=1024)
    account = profile(found.directory, packing="none", workers=1)
    said = [alert["text"] for alert in account["alerts"] if alert["level"] == "problem"]
    assert any(text.startswith("There is no validation data") for text in said)
    padding = 1 - found.report["train"]["packing_efficiency"]["none"]
    assert any(
        text.startswith(f"{padding:.0%} of every row will be padding with packing=none") for text in said
    )
    # Lengths and ratios are measured even where no rule asked for them.
    assert {"words", "letter_words"} <= {attribute["name"] for attribute in account["attributes"]}


def test_only_what_stays_in_the_texts_is_said_to_be_left(tmp_path, tokenizers):
    for name, expression in (("all", "true"), ("some", "len(addresses) = 0")):
        rules = (Rule("addresses", expression, "has an address", "here"),)
        cleaning = Plan(steps=(Addresses(),), rules=rules, asked=("addresses",))
        account = profile(prepared(tmp_path, tokenizers["chatml"], cleaning).directory, workers=1)
        said = [alert["text"] for alert in account["alerts"] if "left as it is" in alert["text"]]
        (places,) = account["places"]
        assert places["documents"] > 0
        share = f"{places['documents'] / account['documents']:.0%}"
        where = f"addresses: found in {share} of the documents that are kept, and left as it is"
        assert said == ([f"{where} ({places['places']} email)."] if name == "all" else [])


@pytest.mark.parametrize(("low", "high"), [(181.0, 724.1), (230.0, 250.0), (3.0, 40.0), (1.0, 1e7)])
def test_a_logarithmic_axis_has_numbers_on_it(low, high):
    drawn = histogram("lengths", [low, (low * high) ** 0.5, high], [3, 4], log=True)
    below = [text for y, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>([^<]*)', drawn) if float(y) > 130]
    assert 2 <= len(below) <= 8


class Page(HTMLParser):
    """Every tag and attribute of a page, and the text between tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_document_is_nothing_but_text_on_the_page(made):
    _, found, account = made
    text = (found.directory / "profile.html").read_text(encoding="utf-8")
    seen = Page(text)
    assert not {"script", "img", "iframe", "object", "link"} & seen.tags.keys()
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert any("<script>alert('x')</script>" in part for part in seen.texts), "and yet it is there to be read"
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert json.loads((found.directory / "profile.json").read_text()) == json.loads(json.dumps(account))


def test_the_page_needs_nothing_else(made):
    seen = Page((made[1].directory / "profile.html").read_text(encoding="utf-8"))
    addresses = [
        value for _, name, value in seen.attributes if name in ("src", "href", "action", "xlink:href")
    ]
    ids = {value for _, name, value in seen.attributes if name == "id"}
    assert addresses
    assert all(value[0] == "#" and value[1:] in ids for value in addresses)
    style = "".join(part for part in seen.texts if "{" in part)
    assert "url(" not in style
    assert "@import" not in style
    assert seen.tags["svg"] == sum(name == "role" and value == "img" for _, name, value in seen.attributes)


@pytest.mark.parametrize("text", ["<b>&\"'", "\x00\x1b[2J", "a\u202eb", "\ud800", "</title><script>"])
def test_no_text_leaves_its_place(text):
    source = '{% extends "layout.html" %}{% block main %}<p title="{{ title }}">{{ title }}</p>{% endblock %}'
    whole = environment().from_string(source).render(title=text)
    assert Page(whole).tags.keys() <= {"html", "head", "meta", "title", "style", "body", "main", "p"}
    whole.encode()


def test_the_same_whatever_the_workers_and_from_the_account_alone(made, monkeypatch):
    monkeypatch.setattr("ropewalk.data.parts.ALONE", 0)
    _, found, account = made
    first = (found.directory / "profile.html").read_bytes()
    for file in (found.directory.parent / "parts").glob("profile-*"):
        file.unlink()
    assert profile(found.directory, workers=2) == account
    assert (found.directory / "profile.html").read_bytes() == first
    assert page(json.loads((found.directory / "profile.json").read_text())).encode() == first


def test_parts_that_are_gone_are_said(tmp_path, tokenizers):
    found = prepared(tmp_path, tokenizers["chatml"])
    next((found.directory.parent / "parts").glob("documents-*")).unlink()
    with pytest.raises(UserError, match=r"is gone; run ropewalk prepare --overwrite"):
        profile(found.directory, workers=1)
    with pytest.raises(UserError, match=r"give a folder that ropewalk prepare made"):
        profile(tmp_path, workers=1)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("words between 50 and 100000", {"words": [50, 100000]}),
        ("0.1 >= hash_ratio", {"hash_ratio": [0.1]}),
        ("not (a > 1 and b < -2.5) or lower(c) = 'x'", {"a": [1], "b": [-2.5]}),
        ("flag", {}),
        ("a > b", {}),
        ("words < 1e999", {}),
    ],
)
def test_limits_are_read_off_an_expression(expression, expected):
    assert {name: found for name, found in thresholds(expression).items() if found} == expected


def test_real_text(shared, tmp_path, tokenizers):
    """The PEPs: their footer is the most repeated run of words, and nothing fails on them."""
    from ropewalk.data.encode import Options
    from ropewalk.data.entry import name_sources, prepare_sources

    lines = (shared / "data" / "peps.jsonl").read_text().splitlines()[:150]
    (tmp_path / "peps.jsonl").write_text("\n".join(lines))
    sources = name_sources([{"path": str(tmp_path / "peps.jsonl")}])
    options = Options(sequence_length=512, validation_fraction=0.05)
    found = prepare_sources(sources, [], tokenizers["none"], options, tmp_path / "out", workers=1)
    account = profile(found.directory, workers=1)
    assert any("placed in the public domain" in entry["text"] for entry in account["ngrams"]["top"][:3])
