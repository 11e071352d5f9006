"""The data benchmarks: cases of the modules that are there, and the same settings for both sides."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def module(monkeypatch):
    """`module(name)`: one of the benchmarks, imported as their own scripts import them."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("data", "measure"):  # a folder of tests has the name of a benchmark
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(BENCH) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_cases_of_all_modules_that_are_there_are_written(module, tmp_path, monkeypatch, capsys):
    data = module("data")
    case = {"case": "c", "peer": "p", "ours": 6.0, "peer_value": 2.0, "unit": "texts/s", "ratio": 3.0}
    (tmp_path / "data_rules.py").write_text(f"def cases(directory):\n    return [{case}]\n")
    monkeypatch.setattr(data, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--out", str(tmp_path / "out" / "data.json")])
    data.main()
    (written,) = json.loads((tmp_path / "out" / "data.json").read_text())
    assert written.pop("machine")["cores"]
    assert written == case
    assert capsys.readouterr().out == "c against p: 6 to 2 texts/s, 3 times\n"
    sys.modules.pop("data_rules")


def test_both_sides_compare_in_the_same_bands_and_ours_runs(module, tmp_path, shared):
    from ropewalk.clean.duplicates.sketch import bands_for

    duplicates = module("data_duplicates")
    assert bands_for(duplicates.THRESHOLD, duplicates.RECALL) == (duplicates.BANDS, duplicates.ROWS)
    texts = [f"text {i % 7} about {i % 7} things to {i % 7} people" for i in range(20)]
    records = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    duplicates.write(records, tmp_path / "in", files=3)
    places = {"in": str(tmp_path / "in"), "out": str(tmp_path / "out")}
    job = {**places, "threshold": 0.8, "recall": 0.95, "words": 5}
    done = subprocess.run(
        [sys.executable, str(BENCH / "sides" / "duplicates_ropewalk.py"), json.dumps(job)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.removeprefix("RESULT "))
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").open()]
    assert [record["id"] for record in kept] == result["kept"]
    assert sorted(record["text"] for record in kept) == sorted(set(texts))
