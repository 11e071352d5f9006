"""doctor launches what it reports on."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

import ropewalk.doctor as doctor
from ropewalk.cli import main
from ropewalk.cli.doctor import _rate
from ropewalk.ops import native
from ropewalk.plan.calibration import NEVER, calibration, probes


@pytest.fixture
def no_compile(monkeypatch):
    """Compiling takes seconds; one test does it for real."""
    monkeypatch.setattr(
        doctor, "_compile", lambda device: doctor.Launch("compile", "float32", True, 1.0, 0.0)
    )


def test_the_report_of_this_machine(no_compile, capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cpu = report["devices"][0]
    assert cpu["name"] == "cpu"
    assert 0 < cpu["memory_free"] <= cpu["memory_total"]
    launches = {(launch["operation"], launch["dtype"]): launch for launch in cpu["launches"]}
    assert launches["matmul", "float32"]["ok"]
    assert launches["attention", "float32"]["ok"]
    assert launches["matmul", "float32"]["gflops"] > 0
    kernels = {launch["operation"]: launch for launch in cpu["attention"] if launch["dtype"] == "float32"}
    assert kernels["math"]["ok"]
    assert not kernels["cudnn"]["ok"]  # no CPU has it: so the kernels are really forced
    assert kernels["cudnn"]["reason"]
    assert {package["name"] for package in report["packages"]} >= {"torch", "transformers", "pydantic"}
    assert cpu["recommended_precision"] in ("float32", "bfloat16")
    assert report["healthy"]


def test_the_text_names_devices_kernels_and_versions(no_compile, capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("cpu:", "matmul", "bfloat16", "math", "compile", "torch", "GiB", "recommended precision"):
        assert word in text


def test_a_wrong_result_is_noticed():
    import torch

    exact = torch.ones(4, dtype=torch.float64)
    right = doctor._launched("x", "float32", "cpu", lambda: [exact.float() + 1e-6], [exact])
    wrong = doctor._launched("x", "float32", "cpu", lambda: [exact.float() + 1e-2], [exact])
    broken = doctor._launched("x", "float32", "cpu", lambda: [exact.float() * float("nan")], [exact])
    assert right.ok
    assert not wrong.ok
    assert "off by" in wrong.reason
    assert not broken.ok


def test_a_launch_that_raises_is_a_finding_and_not_an_error():
    def fail():
        raise RuntimeError("no kernel here\nand a long story")

    launch = doctor._launched("x", "float32", "cpu", fail, [])
    assert (launch.ok, launch.reason) == (False, "no kernel here")


def test_advice_names_what_is_wrong(no_compile, monkeypatch):
    report = doctor.doctor()
    bad = doctor.Launch("matmul", "float32", False, reason="it broke")
    cpu = doctor.replace(
        report.devices[0],
        launches=[bad],
        compiles=doctor.Launch("compile", "float32", False, reason="no g++"),
        memory_free=1 << 30,
    )
    packages = [doctor.Package("torch", "1.0", "2.13.0"), doctor.Package("rich", None, "15.0.0")]
    sick = doctor.replace(report, devices=[cpu], packages=packages, disk_free={"here": 1})
    advice = "\n".join(doctor._advice(sick))
    for said in (
        "it broke",
        "train.compile",
        "GiB of memory",
        "torch 1.0 is installed",
        "rich is not installed",
    ):
        assert said in advice
    assert not sick.healthy


@pytest.mark.slow
def test_compiling_is_tried_for_real():
    launch = doctor._compile("cpu")
    assert launch.ok or launch.reason


def test_a_rate_that_no_machine_has_is_not_printed_as_one():
    """A fit that gives a part no time says so."""
    assert _rate(2.5e12, "GFLOP/s") == "2,500.0 GFLOP/s"
    assert _rate(NEVER, "GB/s") == _rate(NEVER / 1e3, "GB/s") == "not told apart"


@pytest.mark.slow
def test_a_calibration_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    """As short as can be: the planner takes it from then on."""
    native.library()  # not to be compiled for the new cache
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path))
    module = importlib.import_module("ropewalk.plan.calibrate")
    small = [work for work in probes("cpu", "bfloat16") if work.config.hidden_size == 384]
    monkeypatch.setattr(
        module,
        "probes",
        lambda _, precision: [dataclasses.replace(one, precision=precision) for one in small],
    )
    monkeypatch.setattr(module, "LARGEST", 1 << 22)
    assert main(["doctor", "--calibrate", "--seconds", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["path"]).is_relative_to(tmp_path)
    kept = calibration(said["calibration"]["device"])
    assert kept is not None
    assert kept.rates["bfloat16"].products > 1e9
    assert set(kept.rates) == {"bfloat16", "float32"}
