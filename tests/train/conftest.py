"""What tests of training look at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def trace() -> Callable[[Path], list[dict[str, Any]]]:
    """What must be the same in two runs: every record's step and numbers, without times and speeds."""
    kept = ("kind", "step", "loss", "gradient_norm", "learning_rate", "tokens_seen", "scored_tokens_seen")

    def read(run: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (run / "metrics-train.jsonl").read_text().splitlines()]
        return [
            {key: record[key] for key in kept if key in record}
            for record in records
            if record["kind"] in ("train", "validation")
        ]

    return read
