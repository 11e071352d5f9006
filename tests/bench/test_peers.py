"""The comparison with other tools: what it computes, that its cases are valid recipes, and that it runs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
MODULES = ("cases", "environments", "measure", "peers", "ladder", "shapes", "step_profile", "work")


@pytest.fixture(scope="module")
def bench():
    """The benchmarks' modules, imported as their own scripts import them."""
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCH))
        for name in MODULES:
            sys.modules.pop(name, None)


def run(bench, side, seconds, tokens, scored, peak, **others):
    result = {"seconds": seconds, "tokens": tokens, "scored_tokens": scored, **others}
    return bench.measure.Measurement(side, 1.0, 1.0, peak, 0.0, result)


def test_ratios_are_ours_over_theirs_from_medians_without_the_first_step(bench):
    done = [
        run(bench, "ropewalk", [9.0, 1.0, 1.0], [100, 300, 100], [10, 30, 10], 50),
        run(bench, "other", [9.0, 2.0], [100, 200], [10, 10], 100),
        run(bench, "ropewalk", [9.0, 1.0], [100, 300], [10, 30], 70),
        run(bench, "other", [9.0, 2.0], [100, 400], [10, 30], 200),
        run(bench, "ropewalk", [9.0, 1.0], [100, 100], [10, 10], 60),
        run(bench, "other", [9.0, 2.0], [100, 100], [10, 20], 300),
    ]
    entry = bench.peers.compared(done, "other")
    assert entry["ours_tokens_per_s"] == 200.0
    assert entry["peer_tokens_per_s"] == 100.0
    assert (entry["speed_ratio"], entry["scored_speed_ratio"], entry["memory_ratio"]) == (2.0, 2.0, 0.3)
    assert (entry["runs"], entry["ours_first_step_s"]) == (3, 9.0)
    json.dumps(entry)


def test_a_gpu_s_memory_is_what_is_compared_where_there_is_one(bench):
    done = [
        run(bench, "ropewalk", [1.0, 1.0], [1, 1], [1, 1], 10, device_peak_bytes=400),
        run(bench, "other", [1.0, 1.0], [1, 1], [1, 1], 10, device_peak_bytes=800),
    ]
    entry = bench.peers.compared(done, "other")
    assert (entry["memory_ratio"], entry["ours_host_peak_bytes"]) == (0.5, 10)


def test_without_a_peer_there_is_no_ratio(bench):
    entry = bench.peers.compared([run(bench, "ropewalk", [1.0, 2.0], [5, 6], [1, 1], 7)], None)
    assert entry["ours_tokens_per_s"] == 3.0
    assert entry["peer_tokens_per_s"] is entry["speed_ratio"] is entry["memory_ratio"] is None


@pytest.fixture
def options(tmp_path):
    values = {"device": "cpu", "threads": 1, "runs": 2, "peer": None, "quick": True, "in_place": True}
    return SimpleNamespace(**values, environments=tmp_path)


def test_a_peer_that_fails_is_said_and_left_out_of_the_next_runs(bench, options, tmp_path, monkeypatch):
    """Never a figure that nobody measured: an entry with the reason, and the others go on."""
    calls = []

    def measured(key, *others):
        calls.append(key)
        if key == "litgpt":
            raise RuntimeError("litgpt ended with 1:\nTraceback\nMemoryError: all of it\n")
        return run(bench, key, [1.0, 1.0], [8, 8], [4, 4], 100)

    monkeypatch.setattr(bench.peers, "prepare", lambda *arguments: {"recipe": {}})
    monkeypatch.setattr(bench.peers, "_run", measured)
    case = bench.cases.CASES["llama3-8b-lora"]
    entries = {entry["peer"]: entry for entry in bench.peers.run_case("c", case, tmp_path, options)}
    assert entries["litgpt"] == {"case": "c", "peer": "litgpt", "skipped": "MemoryError: all of it"}
    assert entries["liger"]["skipped"] == entries["unsloth"]["skipped"] == "it needs a GPU"
    assert (entries["trl"]["speed_ratio"], entries["trl"]["runs"]) == (1.0, 2)
    assert calls.count("litgpt") == 1
    assert calls.index("trl") < len(calls) - 1 - calls[::-1].index("ropewalk")  # in turn, not in blocks
    assert "MemoryError" in bench.peers.summary(list(entries.values()))


def test_where_ropewalk_fails_nothing_is_compared(bench, options, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("ropewalk ended with 2")

    monkeypatch.setattr(bench.peers, "prepare", lambda *arguments: {"recipe": {}})
    monkeypatch.setattr(bench.peers, "_run", broken)
    with pytest.raises(RuntimeError, match="ropewalk ended"):
        bench.peers.run_case("full", bench.cases.CASES["full"], tmp_path, options)


def test_every_case_is_a_valid_recipe(bench, tmp_path):
    from ropewalk.recipe import load_recipe, resolve

    for name, case in bench.cases.CASES.items():
        for variant in (case, bench.cases.quick(case)):
            options = SimpleNamespace(device=case.device, threads=1)
            config = bench.shapes.SHAPES.get(variant.shape)
            values = bench.peers.recipe_of(variant, tmp_path, config, tmp_path, options)
            recipe = resolve(load_recipe(values)).recipe
            assert recipe.train.batch_size == variant.batch_size, name
            assert (recipe.adapt.rank if variant.rank else None) == variant.rank, name


def test_every_rung_is_a_valid_recipe_and_stands_on_one_before_it(bench, tmp_path):
    from ropewalk.recipe import load_recipe, resolve

    options = SimpleNamespace(device="cpu", threads=1, steps=2, sequence_length=512)
    seen = {}
    for rung in bench.ladder.RUNGS:
        assert rung.after is None or rung.after in seen
        seen[rung.name] = seen.get(rung.after, {}) | rung.changes
        values = bench.ladder._base(tmp_path, options) | seen[rung.name]
        resolve(load_recipe(bench.peers.nested(values)))


def test_sizes_of_the_shapes(bench):
    import torch

    from ropewalk.model import Transformer
    from ropewalk.model.families_config import config_from_hf

    for name, millions in {
        "30m": 30.0,
        "smollm2-135m": 134.5,
        "llama-3.2-1b": 1235.8,
        "llama-3.2-3b": 3212.7,
        "llama-3-8b": 8030.3,
    }.items():
        shape = bench.shapes.SHAPES[name]
        with torch.device("meta"):
            model = Transformer(config_from_hf(shape, name))
        count = sum(p.numel() for p in model.parameters())
        assert count == bench.shapes.parameters(shape)
        assert round(count / 1e6, 1) == millions


def recipe_for(folder):
    return {
        "name": "x",
        "model": {"source": str(folder / "model")},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "validation_fraction": 0.0,
            "sequence_length": 512,
            "directory": str(folder / "prepared"),
        },
        "train": {"steps": 1},
    }


def test_all_sides_are_given_the_tokens_that_were_drawn(bench, tmp_path):
    work = bench.work
    work.write_model(tmp_path / "model", bench.shapes.SHAPES["tiny"], weights=False, seed=0)
    work.synthetic_documents(tmp_path, 512, 5, 64, seed=0)
    counts = work.write_tokens(tmp_path, recipe_for(tmp_path))
    assert counts == {"documents": 5, "tokens": 320, "scored_tokens": 315}
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    drawn = [[int(word) for word in text.split()] + [2] for text in texts]
    assert [row["tokens"] for row in rows] == drawn
    assert [row["labels"] for row in rows] == [[-100, *row[1:]] for row in drawn]
    assert np.load(tmp_path / "stream.npy").tolist() == [token for row in drawn for token in row]


def test_the_ladder_s_documents_have_the_quickstart_s_lengths_and_scored_share(bench, tmp_path):
    work = bench.work
    work.write_model(tmp_path / "model", bench.shapes.SHAPES["tiny"], weights=False, seed=0)
    work.synthetic_conversations(tmp_path, 512, 400, seed=0, **bench.ladder.LENGTHS)
    counts = work.write_tokens(tmp_path, recipe_for(tmp_path))
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["tokens"]) for line in lines]
    assert 66 <= min(lengths) <= max(lengths) <= 400
    assert 110 <= np.median(lengths) <= 126
    assert 0.09 < counts["scored_tokens"] / counts["tokens"] < 0.12


def call(script, *options):
    command = [sys.executable, str(BENCH / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_case_runs_beside_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate")
    out = tmp_path / "out.json"
    options = "--device cpu --quick --in-place --case full --peer trainer --runs 1 --threads 1 --out".split()
    call("peers.py", *options, out, "--work", tmp_path / "work")
    job = tmp_path / "work" / "full" / "ropewalk.json"
    before = set(job.parent.glob("runs/*/checkpoints/step-*"))
    job.write_text(json.dumps(json.loads(job.read_text()) | {"save": False}))  # as on a GPU
    call("sides/with_ropewalk.py", job)
    assert set(job.parent.glob("runs/*/checkpoints/step-*")) == before
    assert len(list(job.parent.glob("runs/*/report.md"))) == 2
    (entry,) = json.loads(out.read_text())
    assert (entry["case"], entry["peer"], entry["runs"], entry["quick"]) == ("full", "trainer", 1, True)
    assert entry["speed_ratio"] == entry["ours_tokens_per_s"] / entry["peer_tokens_per_s"] > 0
    assert entry["memory_ratio"] == entry["ours_peak_bytes"] / entry["peer_peak_bytes"] > 0
    ours, theirs = (entry[f"{side}_measurements"][0]["result"] for side in ("ours", "peer"))
    assert ours["tokens"] == theirs["tokens"] == [128, 128, 128]
    assert ours["trainable"] == theirs["trainable"]
    # random words: every tool starts at the loss of not knowing anything
    assert ours["losses"][0] == pytest.approx(np.log(512), rel=0.05)
    assert theirs["losses"][0] == pytest.approx(np.log(512), rel=0.05)


@pytest.mark.slow
def test_the_ladder_runs_and_its_first_rungs_compute_the_same(tmp_path):
    out = tmp_path / "out.json"
    names = ["transformers loop", "Ropewalk, plain operations", "own operations, chunked loss"]
    chosen = [word for name in names for word in ("--rung", name)]
    call("ladder.py", "--quick", "--threads", "1", "--out", out, *chosen)
    content = json.loads(out.read_text())
    assert [row["rung"] for row in content["rungs"]] == names
    assert all(row["gradient_norm"] > 0 and row["tokens_per_s"] > 0 for row in content["rungs"])
    plain, own = (run["result"] for run in content["measurements"][1:3])
    assert own["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert own["gradient_norms"] == pytest.approx(plain["gradient_norms"], rel=1e-4)
    assert 0 < content["rungs"][1]["mfu"] < 1


@pytest.mark.slow
def test_attention_s_candidates_are_compared(tmp_path):
    """Each candidate that is timed has given the reference's result; Ropewalk's own choice always has."""
    out = tmp_path / "out.json"
    call("attention.py", "--quick", "--runs", "1", "--threads", "1", "--out", out)
    plain, capped = json.loads(out.read_text())["shapes"]
    assert {"pick", "flash", "flash in float32", "math", "written out"} <= set(plain["seconds"])
    assert {"pick", "written out"} == set(capped["seconds"])
    assert "packed" in plain["left_out"]


def test_a_step_is_profiled_at_two_depths(capsys, monkeypatch, bench):
    """The whole is foreseen from what a block takes."""
    arguments = "--device cpu --shape tiny --length 64 --blocks 1 2 --runs 1 --kernels 0 --rank 2"
    monkeypatch.setattr("sys.argv", ["step_profile.py", *arguments.split(), "--no-compile"])
    bench.step_profile.main()
    assert "all 2 blocks: forward and backward" in capsys.readouterr().out
