"""`ropewalk doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ropewalk.cli.options import Json, print_json

if TYPE_CHECKING:
    from ropewalk.doctor import Launch, Report


def command(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure for half a minute what `ropewalk plan` needs; kept.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="Calibrate for so long in each of two precisions.")
    ] = 15.0,
    json: Json = False,
) -> None:
    """Find out by trying what this machine can really do.

    Small computations are launched on every device, in every type, with every attention kernel, and
    compiled; each is timed and compared with float64.
    """
    from dataclasses import asdict

    from ropewalk.doctor import doctor

    if calibrate:
        _calibrate(json, seconds)
        return

    report = doctor()
    if json:
        print_json({**asdict(report), "healthy": report.healthy})
    else:
        print("\n".join(_lines(report)))
    if not report.healthy:
        raise typer.Exit(1)


def _calibrate(json: bool, seconds: float) -> None:
    import torch

    from ropewalk.plan import calibrate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(text: str) -> None:
        if not json:
            print(f"measuring: {text}", flush=True)

    found = calibrate(device, say, seconds)
    path = found.save()
    if json:
        print_json({"calibration": found, "path": path})
        return
    for precision, rates in found.rates.items():
        print(
            f"{precision}: products {_rate(rates.products, 'GFLOP/s')}, "
            f"attention {_rate(rates.attention, 'GFLOP/s')}, memory {_rate(rates.memory, 'GB/s')}, "
            f"updates {_rate(rates.update, 'GB/s')}, NF4 {rates.unpack['nf4'] / 1e9:.1f} G numbers/s; "
            f"these account for the passes to {100 * rates.error:.0f}%"
        )
    print(f"disk: {found.disk / 1e6:,.0f} MB/s; kept in {path}")
    if max(rates.error for rates in found.rates.values()) > 0.1:
        print("the machine did something else, too: measure when it is quiet, or longer (--seconds 120)")


def _rate(value: float, unit: str) -> str:
    """Beyond what any machine does, the passes did not tell its time from that of the others."""
    return f"{value / 1e9:,.1f} {unit}" if value < 1e21 else "not told apart"


def _lines(report: "Report") -> list[str]:
    here = report.environment
    lines = [
        f"machine     {here['cpu']}, {here['cores']} cores, {report.threads} threads, {here['platform']}",
        f"python      {here['python']}",
        "disk        " + ", ".join(f"{_gib(free)} free {where}" for where, free in report.disk_free.items()),
    ]
    for package in report.packages:
        tested = "" if package.tested is None else f" (tested with {package.tested})"
        lines.append(f"package     {package.name} {package.installed or 'MISSING'}{tested}")
    for device in report.devices:
        lines.append(
            f"\n{device.name}: {device.model}, {_gib(device.memory_free)} free of {_gib(device.memory_total)}"
        )
        lines += [f"  {_launch(launch)}" for launch in device.launches]
        lines += ["  attention kernels, forced one by one, forward and backward:"]
        lines += [f"    {_launch(launch)}" for launch in device.attention]
        lines += [f"  {_launch(device.compiles)}", f"  recommended precision: {device.recommended_precision}"]
    lines += ["", *(f"advice: {text}" for text in report.advice)] if report.advice else ["", "all is well"]
    return lines


def _launch(launch: "Launch") -> str:
    head = f"{launch.operation:<10} {launch.dtype:<9}"
    if launch.milliseconds is None or launch.error is None:
        return f"{head} no: {launch.reason}"
    speed = f" {launch.gflops:7.0f} GFLOP/s" if launch.gflops else ""
    verdict = "ok" if launch.ok else f"WRONG ({launch.reason})"
    return f"{head} {launch.milliseconds:9.2f} ms{speed}  error {launch.error:.0e}  {verdict}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
