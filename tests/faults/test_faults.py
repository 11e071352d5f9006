"""A few of the faults of `make faults`, each in a run of two or four processes: survived, and named."""

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_injected_faults_are_survived_and_named() -> None:
    command = [sys.executable, str(CAMPAIGN), "--seed", "2963", "--count", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("\n6 injected, 6 survived, 6 named\n"), done.stdout + done.stderr
    assert done.returncode == 0
