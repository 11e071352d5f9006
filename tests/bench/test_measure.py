"""The benchmarks' measuring code measures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("bench_measure", BENCH / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python(code):
    return [sys.executable, "-c", code]


def test_peak_memory_time_and_result_of_a_command(measure):
    code = "x = b'1' * 300_000_000; import time; time.sleep(0.3); print('RESULT {\"a\": 1}'); print('more')"
    found = measure.measure("side", python(code))
    assert found.result == {"a": 1}
    assert 300e6 < found.peak_bytes < 400e6
    assert 0.3 < found.seconds < 30
    assert 0.02 < found.processor_seconds < found.seconds + 1


def test_memory_of_children_counts(measure):
    hold = "x = b'1' * 150_000_000; import time; time.sleep(1)"
    code = (
        "import subprocess, sys\n"
        f"c = [subprocess.Popen([sys.executable, '-c', {hold!r}]) for _ in range(2)]\n"
        "[p.wait() for p in c]; print('RESULT {}')"
    )
    assert 300e6 < measure.measure("side", python(code)).peak_bytes < 450e6


@pytest.mark.parametrize("code", ["print('it broke'); raise SystemExit(3)", "print('it broke')"])
def test_a_failing_command_shows_its_output(measure, code):
    with pytest.raises(RuntimeError, match="it broke"):
        measure.measure("side", python(code))


def test_a_command_that_hangs_is_ended(measure):
    with pytest.raises(RuntimeError, match="ended with -9"):
        measure.measure("side", python("import time; time.sleep(60)"), timeout=0.5)


def test_results_are_written_with_the_machine(measure, tmp_path):
    runs = measure.interleave(2, {name: lambda n=name: _fake(measure, n) for name in ("a", "b")})
    assert [m.side for m in runs] == ["a", "b", "a", "b"]
    assert measure.median(runs, "b", lambda m: m.seconds) == 2.0
    measure.write_results(tmp_path / "x" / "r.json", runs, {"runs": 2}, [])
    content = json.loads((tmp_path / "x" / "r.json").read_text())
    assert content["machine"]["cores"] >= 1
    assert len(content["runs"]) == 4


def _fake(measure, side):
    return measure.Measurement(side, {"a": 1.0, "b": 2.0}[side], 1.0, 10, 0.1, {})
