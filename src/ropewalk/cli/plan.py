"""`ropewalk plan`: a recipe's memory, time and money beforehand; budgets, failures, serving, and a fit to
runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ropewalk.cli import plan_questions
from ropewalk.cli.options import Commands, Json, Overrides, print_json, print_table

if TYPE_CHECKING:
    from ropewalk.plan import Estimate, Plan


class RecipeOrCommand(TyperGroup):
    """`plan RECIPE` beside `plan fit RUNS`: what is no command's name is a recipe."""

    default = "recipe"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.default, *args])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help",):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = Commands(
    cls=RecipeOrCommand,
    help="What a run will take, before it is started: ropewalk plan RECIPE. And questions beside it:",
    rich_markup_mode=None,
)
for _command in (plan_questions.budget, plan_questions.fit, plan_questions.failures, plan_questions.serving):
    app.command()(_command)
On = Annotated[
    str | None,
    typer.Option(
        "--on", help="Cluster: 8xH100, 4x8xA100-80GB-SXM or a YAML file; unless told, this machine."
    ),
]
Network = Annotated[str | None, typer.Option(help="Connections of one node, as in 8x200Gb/s.")]


@app.command("recipe")
def recipe(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    on: On = None,
    network: Network = None,
    by: Annotated[str, typer.Option(help="Rank layouts by time, cost or goodput.")] = "time",
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Search this too: precision, adaptation. What is trained is then another thing."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write two plots, memory and time, to this .png or .svg.")
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Run the real step on tensors without data and compare term by term."),
    ] = False,
    accuracy: Annotated[
        Path | None,
        typer.Option(help="Say how well the plans of the runs in this folder came true.", metavar="FOLDER"),
    ] = None,
    json: Json = False,
) -> None:
    """Whether a run fits, how long it takes, what it costs, and which layout is best. Nothing is started."""
    from ropewalk.errors import UserError
    from ropewalk.plan import as_json, plan

    if accuracy is not None:
        _show_accuracy(accuracy, json)
        return
    if recipe is None:
        raise UserError("plan: give a recipe, or --accuracy and a folder of runs")
    if by not in ("time", "cost", "goodput"):
        raise UserError(f"--by {by}: one of time, cost, goodput")
    for one in vary or ():
        if one not in ("precision", "adaptation"):
            raise UserError(f"--vary {one}: one of precision, adaptation")
    made = plan(recipe, overrides or (), on, network, by, vary or ())  # type: ignore[arg-type]  # checked above
    traced = _traced(made) if trace else None
    if plot is not None:
        from ropewalk.plan.plots import draw

        draw(made.run, plot)
    if json:
        print_json({**as_json(made), **({"traced": traced} if traced else {})})
    else:
        print("\n".join(_lines(made)))
        if traced:
            print("\nterm by term, counted and traced (GiB):")
            print_table(("", "counted", "traced"), traced)


def _traced(made: "Plan") -> list[tuple[str, float, float]]:
    from ropewalk.plan.trace import trace_step

    found = trace_step(made.run.work)
    ours = made.run.memory.terms
    names = list(dict.fromkeys([*ours, *found.terms]))
    rows = [(name, ours.get(name, 0) / 2**30, found.terms.get(name, 0) / 2**30) for name in names]
    return [*rows, ("peak", made.run.memory.total_bytes / 2**30, found.total_bytes / 2**30)]


def _lines(made: "Plan") -> list[str]:
    from ropewalk.plan.step_time import WAITING

    run = made.run
    memory = run.memory
    limit = f"{_gib(memory.limit)} of each device"
    verdict = f"yes: {_gib(memory.total_bytes)} ({_gib(memory.low)} to {_gib(memory.high)}) of {limit}"
    if not run.fits:
        verdict = f"NO: {_gib(memory.total_bytes)} (up to {_gib(memory.high)}) of {limit}"
    lines = [
        f"{made.recipe}: {made.parameters:,} parameters on {run.cluster}",
        f"layout   {_layout(run)}",
        f"fits     {verdict}; the peak is {memory.peak}",
        f"time     {_seconds(run.step_seconds)} a step, {run.tokens_per_second:,.0f} tokens/s"
        f"; {100 * run.mfu_causal:.1f}% of the peak in model FLOPs ({100 * run.mfu:.1f}% by all pairs)",
    ]
    device = run.cluster.accelerator
    if device.name.startswith("CPU") and not device.calibrated:
        lines.append(
            f"rates    of a common {device.name}, which others surpass several times; "
            "`ropewalk doctor --calibrate` measures this machine's"
        )
    if (waits := run.time.phases.get(WAITING, 0.0) / run.step_seconds) > 0.2:
        lines.append(
            f"slow     the GPU waits {waits:.0%} of the step for what the host sends it: "
            "larger micro-batches, or train.compile: true, are faster"
        )
    if sent := run.sent:
        said = ", ".join(f"{kind} {_gib(size)}" for kind, size in sent.items())
        lines.append(f"sends    {said} a step, of each device")
    if (price := run.dollars_per_hour) is not None:
        million = price / 3600 / run.tokens_per_second * 1e6
        lines.append(f"price    ${price:,.2f} an hour, ${million:,.3f} a million tokens, at list prices")
    if made.seconds is not None:
        cost = "" if made.dollars is None else f", ${made.dollars:,.2f}"
        lines.append(f"run      {made.steps:,} steps in {_seconds(made.seconds)}{cost}")
    work = run.work
    if made.data is None:
        lines.append("data     not prepared: a row is one document, all of it scored")
    else:
        held = f"documents of {work.document_length:,} tokens, {work.scored:.0%} of the rows scored"
        lines.append(f"data     {made.data}: {held}")
    lines += ["", *_bars("memory of the device that holds most", memory.terms, _gib)]
    if memory.host_terms:
        lines += ["", *_bars("memory of the host", memory.host_terms, _gib)]
    lines += ["", *_bars("time of a step", run.time.phases, _seconds)]
    if not run.fits:
        lines += ["", *_fixes(made)]
    if made.ranked:
        lines += ["", "best layouts for the same step:"]
        lines += [f"  {i}. {_why(one, made.run)}" for i, one in enumerate(made.ranked, 1)]
    else:
        lines += ["", f"no layout of this step fits on {run.cluster}"]
    return lines


def _fixes(made: "Plan") -> list[str]:
    short = made.run.memory.high - made.run.memory.limit
    lines = [f"short {_gib(max(0.0, short))}:"]
    for fix in made.fixes[:6]:
        cost = f"{100 * fix.slower:+.0f}% time"
        lines.append(f"  {fix.change} saves {_gib(fix.saved)} at {cost}{': it fits' if fix.fits else ''}")
    if not made.fixes:
        lines.append(
            "  no single change of the recipe helps; take more or larger devices, or a smaller model"
        )
    return lines


def _layout(run: "Estimate") -> str:
    layout, work = run.layout, run.work
    named = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
    more = {"shard": f" (ZeRO {layout.stage})"}
    said = [f"{n} {getattr(layout, n)}{more.get(n, '')}" for n in named if getattr(layout, n) > 1]
    spread = " x ".join(said) or "one device"
    saver = "" if work.checkpointing == "none" else f", checkpointing {work.checkpointing}"
    method = "" if work.method == "full" else f", {work.method}"
    if work.quantize != "none":
        method += f" on {work.quantize}"
    passes = f"{work.accumulation} micro-batch{'es' * (work.accumulation > 1)} of {work.micro_batch_size}"
    return f"{spread}; {passes} x {work.sequence_length:,} tokens, {work.precision}{method}{saver}"


def _why(one: "Estimate", asked: "Estimate") -> str:
    from ropewalk.plan.entry import as_overrides

    slowest = sorted(one.time.phases.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {100 * value / one.step_seconds:.0f}%" for name, value in slowest[:4])
    faster = asked.step_seconds / one.step_seconds
    held = f"{_gib(one.memory.high)} of {_gib(one.memory.limit)}"
    already = as_overrides(asked.work)
    change = (
        " ".join(word for word in as_overrides(one.work) if word not in already) or "as the recipe has it"
    )
    speed = f"{_seconds(one.step_seconds)} a step ({faster:.2f} x the recipe's speed)"
    return f"{_layout(one)}\n     {speed}, {held}; {shares}\n     {change or 'as the recipe has it'}"


def _bars(title: str, values: dict[str, Any], say: Any) -> list[str]:
    total = sum(values.values()) or 1
    most = max(values.values(), default=1) or 1
    lines = [f"{title}:"]
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        if value >= 0.001 * total:
            lines.append(f"  {name:<24} {say(value):>11}  {'#' * round(30 * value / most)}")
    return lines


def _show_accuracy(folder: Path, json: bool) -> None:
    from ropewalk.plan import accuracy

    found = accuracy(folder)
    if json:
        rows = [{"run": str(run), **vars(one), "error": one.error} for run, one in found]
        print_json({"runs": rows})
        return
    header = ("run", "what", "predicted", "measured", "error")
    print_table(
        header, [(run.name, o.what, o.predicted, o.measured, f"{100 * o.error:+.1f}%") for run, o in found]
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _seconds(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
