"""report.md of a finished run: what was trained, on what, with what result."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropewalk.evaluate import Sample, panel_markdown
from ropewalk.track import RunDirectory
from ropewalk.train.goodput import goodput
from ropewalk.train.job import Job
from ropewalk.train.passes import stated
from ropewalk.train.stragglers import EVERY

if TYPE_CHECKING:
    from ropewalk.plan.entry import Outcome


def write_report(job: Job, run: RunDirectory, foreseen: Sequence["Outcome"] = ()) -> None:
    """Writes report.md; whoever finds one knows that the run is finished."""
    lines = [*_lines(job, run), *_foreseen(foreseen)]
    run.write_text("report.md", "\n".join(lines) + "\n")


def _foreseen(found: Sequence["Outcome"]) -> list[str]:
    if not found:
        return []
    lines = ["", "## As planned?", "", "| | planned | measured | difference |", "|---|---|---|---|"]
    for one in found:
        unit, size = ("MiB", 2**20) if one.what.startswith("bytes") else ("s", 1)
        planned, measured = (f"{value / size:,.4g} {unit}" for value in (one.predicted, one.measured))
        lines.append(f"| {one.what} | {planned} | {measured} | {one.predicted / one.measured - 1:+.0%} |")
    return lines


def _lines(job: Job, run: RunDirectory) -> list[str]:
    recipe, meter = job.recipe, job.meter
    lineage = run.read_json("lineage.json") or {}
    trained = [record for record in run.read() if record["kind"] == "train"]
    scope = f"{job.built.trainable:,} parameters of {job.built.parameters:,}"
    if job.built.adapted:
        rank = f" of rank {recipe.adapt.rank}" if recipe.adapt.method in ("lora", "dora") else ""
        scope += f", {recipe.adapt.method}{rank} in {len(job.built.adapted)} places"
    if recipe.adapt.quantize != "none":
        scope += f", the frozen matrices in {recipe.adapt.quantize}"
    waited = sum(record["data_wait_seconds"] for record in trained)
    peak = max((record["peak_memory_bytes"] for record in trained), default=meter.peak_memory())
    rows = [
        ("model", job.built.source),
        ("trained", scope),
        ("precision", f"{recipe.train.precision} on {job.device}"),
        ("data", ", ".join(source.path for source in recipe.data.train)),
        ("data fingerprint", lineage.get("data", {}).get("fingerprint", "")),
        ("steps", f"{job.steps:,} of {job.rows} rows of {recipe.data.sequence_length} tokens"),
        ("tokens", f"{meter.tokens_seen:,} (padding excluded), {meter.scored_seen:,} of them scored"),
        ("self-check", str(job.checked).removeprefix("self-check: ") if job.checked else "not in this part"),
        ("time in steps", f"{meter.train_seconds:,.1f} s, {waited:,.2f} s of it waiting for data"),
        ("goodput", str(goodput(run, meter.train_seconds))),
        ("speed", f"{meter.tokens_per_second:,.0f} tokens/s"),
        ("peak memory", f"{peak / 2**20:,.0f} MiB"),
        ("optimizer's memory", f"{job.optimizer.state_bytes() / 2**20:,.0f} MiB"),
    ]
    if sources := stated(job.loader, job.steps * job.rows):
        rows.append(("sources", sources))
    rows += _trouble(run)
    lines = [
        f"# {run.path.name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
    ]
    lines += ["## Loss", "", "| | step | loss |", "|---|---|---|"]
    ends = [trained[0], trained[-1]] if len(trained) > 1 else trained
    lines += [f"| training | {record['step']} | {record['loss']:.4f} |" for record in ends]
    lines += [f"| validation | {step} | {loss:.4f} |" for step, loss in sorted(job.validation_losses.items())]
    if job.validation is None:
        lines.append("\nNo validation data, so nothing says how well this works on text it has not seen.")
    return lines + samples_of(run, job.steps)


def _trouble(run: RunDirectory) -> list[tuple[str, str]]:
    """Rows about what went wrong on the way; none for a run in which nothing did."""
    found: dict[str, list[str]] = {"spikes": [], "skipped steps": [], "rollbacks": [], "stragglers": []}
    late: dict[str, list[float]] = {}
    for record in run.read():
        if record["kind"] == "train" and "spike" in record:
            found["spikes"].append(f"step {record['step']} ({record['spike']:.1f} robust deviations up)")
        elif record["kind"] == "skip":
            found["skipped steps"].append(str(record["step"]))
        elif record["kind"] == "rollback":
            gone = len(record["left_out"][-1])
            found["rollbacks"].append(f"step {record['from']} to step {record['step']}, {gone} left out")
        elif record["kind"] == "straggler":
            late.setdefault(f"process {record['rank']} on {record['host']}", []).append(record["times"])
    for who, times in late.items():
        found["stragglers"].append(
            f"{who}: {max(times):.1f} times the median's work, in {len(times)} looks of {EVERY} steps"
        )
    return [(name, "; ".join(texts)) for name, texts in found.items() if texts]


def samples_of(run: RunDirectory, step: int) -> list[str]:
    """The report's lines about the answers at a step; none where there are no answers."""
    path = run.samples_path / f"step-{step:08d}.jsonl"
    if not path.exists():
        return []
    # not splitlines, which also splits at what JSON leaves as it is in a text, U+0085 and U+2028
    rows = map(json.loads, path.read_text(encoding="utf-8").strip("\n").split("\n"))
    return ["", "## Samples", "", panel_markdown([Sample(**row) for row in rows])]
