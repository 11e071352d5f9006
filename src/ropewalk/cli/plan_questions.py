"""`ropewalk plan budget|fit|failures|serving`: what to train, on how much, on what; and how long it holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ropewalk.cli.options import Json, ModelSource, print_json

On = Annotated[str | None, typer.Option("--on", help="Devices, as in 8xH100, or a cluster file.")]


def budget(
    flops: Annotated[float | None, typer.Option(help="FLOPs to spend, as in 1e21.")] = None,
    on: On = None,
    days: Annotated[float | None, typer.Option(help="Days on those devices.")] = None,
    money: Annotated[float | None, typer.Option(help="Dollars to spend on such devices.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    data: Annotated[float | None, typer.Option(help="Tokens of text that there are.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="A size that is given, to hold against the best.")
    ] = None,
    json: Json = False,
) -> None:
    """The best model and number of tokens for FLOPs, for days on devices, or for money; by published laws."""
    from ropewalk.errors import UserError
    from ropewalk.plan import cluster
    from ropewalk.plan.budget import (
        LAWS,
        RULES,
        allocate,
        best_on_repeated,
        cost,
        deepseek,
        flops_for_money,
        flops_in,
        off_optimum,
    )
    from ropewalk.plan.inputs import positive

    where = cluster(on) if on is not None else None
    device = where.accelerator if where is not None else None
    peak = device.peak_of("bfloat16") if device is not None and "bfloat16" in device.peak else None
    if sum(value is not None for value in (flops, days, money)) != 1:
        raise UserError("plan budget: give one of --flops, --days (with --on) and --money (with --on)")
    if flops is None and (where is None or peak is None):
        raise UserError("plan budget: --days and --money need --on, devices that compute in bfloat16")
    price = None if where is None else where.price if where.price is not None else where.accelerator.price
    if days is not None and where is not None and peak is not None:
        flops = flops_in(where.devices, days, peak, mfu)
    elif money is not None and peak is not None:
        if price is None:
            raise UserError(
                f"plan budget: no price is known of {on}; give it in a cluster file (price: $ an hour)"
            )
        flops = flops_for_money(money, price, peak, mfu)
    assert flops is not None
    for option, value in {"--data": data, "--parameters": parameters}.items():
        if value is not None:
            positive(**{option: value})
    found = [allocate(flops, name) for name in (*LAWS, *RULES)]
    lines = [f"{flops:.3g} FLOPs", *map(str, found), str(deepseek(flops))]
    answer: dict[str, Any] = {"flops": flops, "allocations": found, "deepseek": deepseek(flops)}
    if where is not None and peak is not None:
        answer["cost"] = cost(flops, where.devices, peak, mfu, price)
        lines.append(str(answer["cost"]))
    if data is not None:
        answer["data"] = best_on_repeated(flops, data)
        lines += answer["data"].lines()
    if parameters is not None:
        answer["given"] = off_optimum(parameters, flops / (6 * parameters))
        lines += answer["given"].lines()
    print_json(answer) if json else print("\n".join(lines))


def fit(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Runs, or folders of runs.", show_default=False)
    ],
    flops: Annotated[float | None, typer.Option(help="Also say what is best for so many FLOPs.")] = None,
    json: Json = False,
) -> None:
    """Fit the loss law L = E + A / N^alpha + B / D^beta to your own runs, with intervals."""
    from ropewalk.plan.fit import fit
    from ropewalk.plan.runs import collect

    collected = collect(runs)
    found = fit(collected.points)
    left = [f"left out: {why}" for why in collected.left_out]
    print_json({"fit": found, "left_out": left}) if json else print("\n".join([*left, *found.lines(flops)]))


def failures(
    devices: Annotated[int, typer.Option(min=1, help="Devices of the run.")],
    days: Annotated[float, typer.Option(help="Days that it would take if nothing failed.")],
    save: Annotated[float, typer.Option(help="Seconds of a checkpoint.")] = 60.0,
    stall: Annotated[
        float | None, typer.Option(help="Of those, what training waits; unless told, all.")
    ] = None,
    detect: Annotated[float, typer.Option(help="Seconds until a fault is noticed.")] = 60.0,
    restart: Annotated[float, typer.Option(help="Seconds from there until training goes on.")] = 300.0,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(help="Mean hours between faults of the whole run; unless told, as Llama 3 saw."),
    ] = None,
    spares: Annotated[
        int | None, typer.Option(min=0, help="Servers that stand by; unless told, enough.")
    ] = None,
    what_if: Annotated[
        list[str] | None, typer.Option("--what-if", help="A change, as in restart=290; can be repeated.")
    ] = None,
    trials: Annotated[int, typer.Option(min=2, help="How often the run is played.")] = 20,
    json: Json = False,
) -> None:
    """What failures cost a long run: by a formula, by playing it, and what a change would buy."""
    from ropewalk.errors import UserError
    from ropewalk.plan.failures import FAULTS_PER_DEVICE_DAY, Operation, expected
    from ropewalk.plan.inputs import positive
    from ropewalk.plan.simulate import simulate
    from ropewalk.plan.simulate import what_if as difference

    if mtbf_hours is not None:
        positive(**{"--mtbf-hours": mtbf_hours})
    rate = FAULTS_PER_DEVICE_DAY if mtbf_hours is None else 24 / (mtbf_hours * devices)
    run = Operation(devices, rate, save=save, stall=stall, detect=detect, restart=restart, spares=spares)
    changes: dict[str, Any] = {}
    for word in what_if or ():
        name, _, value = word.partition("=")
        try:
            changes[name] = float(value)
        except ValueError:
            raise UserError(f"--what-if {word}: write it as restart=290") from None
    answer: dict[str, Any] = {"expected": expected(run), "played": simulate(run, days, trials)}
    lines = ["expected:", *answer["expected"].lines(), "played:", *answer["played"].lines()]
    if changes:
        answer["what_if"] = difference(run, days, trials, **changes)
        lines.append(str(answer["what_if"]))
    print_json(answer) if json else print("\n".join(lines))


def serving(
    model: ModelSource,
    on: Annotated[str, typer.Option("--on", help="Devices, as in 1xH100.")] = "1xH100",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request, prompt and answer.")] = 8192,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Of those, the prompt's; unless told, half.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests at once; unless told, the most.")] = None,
    quantization: Annotated[
        str, typer.Option(help="Of the weights: bfloat16, int8, 4-bit kinds.")
    ] = "bfloat16",
    cache: Annotated[str, typer.Option(help="Of keys and values: bfloat16, fp8, int8.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Memory, the largest batch, and tokens a second of a model that is served; one replica on all the
    devices."""
    from ropewalk.model import read_config, resolve_source
    from ropewalk.plan import cluster
    from ropewalk.plan.serving import Machine, serving

    where = cluster(on)
    device = where.accelerator
    kind = "bfloat16" if "bfloat16" in device.peak else "float16"
    machine = Machine(
        device.memory,
        device.memory_bandwidth * device.memory_share,
        device.peak_of(kind) * device.matmul,
        device.link * device.link_share,
        device.latency,
    )
    config = read_config(resolve_source(model))
    found = serving(config, machine, context, prompt, batch, quantization, cache, where.devices)
    print_json(found) if json else print("\n".join(found.lines()))
