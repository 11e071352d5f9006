"""`ropewalk runs ls|show|diff|verify`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.options import Commands, Json, Run, print_json, print_table

app = Commands(help="What was done, from which data, with what result.")


@app.command("ls")
def ls(
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs in a folder, oldest first."""
    from ropewalk.track import list_runs

    found = list_runs(root)
    if json:
        print_json({"runs": found})
    elif not found:
        print(f"no runs in {root}")
    else:
        header = ("run", "status", "started", "step", "loss", "validation", "tokens", "tokens/s", "minutes")
        rows = [
            (
                run.path,
                run.status,
                _when(run.started),
                f"{run.step}/{run.steps if run.steps is not None else '?'}",
                run.loss,
                run.validation_after if run.validation_after is not None else run.validation_before,
                run.tokens_seen,
                run.tokens_per_second,
                run.seconds / 60,
            )
            for run in found
        ]
        print_table(header, rows)


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@app.command("show")
def show(run: Run, json: Json = False) -> None:
    """Show one run: where it stands, what it was made from, its report."""
    from ropewalk.track import RunDirectory, summarize

    summary = summarize(run)
    lineage = RunDirectory.open(run).read_json("lineage.json")
    if json:
        print_json({**vars(summary), "lineage": lineage})
        return
    facts = {**vars(summary), "started": _when(summary.started)}
    del facts["path"]
    print_table(("run", str(summary.path)), facts.items())
    report = run / "report.md"
    if report.is_file():
        print(f"\n{report.read_text(encoding='utf-8')}", end="")


@app.command("diff")
def diff(first: Run, second: Run, json: Json = False) -> None:
    """Show how two runs differ: recipe, data, environment, results."""
    from ropewalk.track import diff_runs

    found = diff_runs(first, second)
    if json:
        print_json({key: [left, right] for key, left, right in found})
    elif not found:
        print("no difference")
    else:
        print_table(("what", str(first), str(second)), found)


@app.command("verify")
def verify(run: Run, json: Json = False) -> None:
    """Check every file of a run's checkpoints against its size and hash; ends with 1 where one is damaged."""
    from ropewalk.track import RunDirectory
    from ropewalk.train.checkpoint import find_damage, list_checkpoints

    checkpoints = list_checkpoints(RunDirectory.open(run).checkpoints_path)
    found = {path.name: find_damage(path) for path in checkpoints}
    if json:
        print_json({"checkpoints": found})
    elif not found:
        print(f"{run}: no checkpoints")
    else:
        for name, damage in found.items():
            print(f"{name}  {'whole' if damage is None else damage}")
    if any(found.values()):
        raise typer.Exit(1)
