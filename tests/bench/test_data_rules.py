"""The benchmark of rules cuts the same pages each time, and its figures of agreement are right."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def rules():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_data_rules", BENCH / "data_rules.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def test_pages_are_the_same_each_time_and_a_third_has_faults(rules, tmp_path):
    text = "\n".join(f"Line {i} of a text, with words {i % 5} in it." for i in range(4000))
    for name in ("peps.jsonl", "rust_book.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    for name in ("wikitext2_valid.txt", "tinyshakespeare.txt"):
        (tmp_path / name).write_text(text)
    first = rules.pages(tmp_path, 60)
    assert first == rules.pages(tmp_path, 60)
    whole = [page in text for page in first]
    assert all(page for i, page in enumerate(whole) if i % 3)
    assert not all(whole)


def test_agreement_counts_equal_verdicts(rules):
    ours = {"gopher_hashes": [True, True, False, True], "gopher_ellipses": [True, False, True, True]}
    theirs = {"gopher_symbols": [True, False, False, False]}
    entries = rules.agreement(ours, theirs, "own words")
    assert [(e["case"], e["ours"], e["peer_value"], e["agreement"]) for e in entries] == [
        ("gopher_symbols, own words", 2, 3, 0.75),
        ("all rules, own words", 2, 3, 0.75),
    ]
