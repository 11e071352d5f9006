"""The two commands of the README, as far as they can be tried without installing anything."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=30
    )


def test_an_old_python_gets_one_clear_message(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert done.stderr.startswith("error: Ropewalk needs Python 3.11 or newer")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", ["demo", "test", "demo-short", "faults"])
def test_targets_make_the_environment_first(target, tmp_path):
    lines = make("-n", target, f"VENV={tmp_path / 'venv'}").stdout.splitlines()
    assert any("-m venv" in line for line in lines)
    torch = next(i for i, line in enumerate(lines) if "torch==" in line)
    project = next(i for i, line in enumerate(lines) if ".[test]" in line)
    assert torch < project


def test_the_demo_runs_the_quickstart(tmp_path):
    text = make("-n", "demo", f"VENV={tmp_path / 'venv'}").stdout
    assert text.index("examples/stdlib_docstrings.py") < text.index("ropewalk run recipes/quickstart.yaml")


def test_ci_runs_the_tests_and_a_short_demo():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.index("make test") < text.index("make demo-short")
    subprocess.run(["bash", "-n", script], check=True)


def test_the_short_demos_overrides_fit_the_quickstart():
    from ropewalk.recipe import load_recipe

    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    overrides = re.search(r"^SHORT := (.*)$", makefile, re.MULTILINE)[1].split()
    assert load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides).train.steps <= 20


def test_constraints_pin_every_dependency():
    import tomllib

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower()
        assert name in names or name == "ropewalk", f"{name} is not in constraints.txt"
    assert pinned["torch"] == "2.13.0"  # of any build: a local version here would exclude the others
    assert all("+" not in version for version in pinned.values())
