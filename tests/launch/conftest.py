"""Stand-ins for the programs of a cluster, and a tiny recipe on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`stand_in("sbatch", "cat > input")`: a program of that name, first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def recipe_file(tmp_path: Path, make_recipe: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`recipe_file(parallel={...}, **train fields)`: the path of a tiny recipe."""

    def make(parallel: dict[str, int] | None = None, **fields: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        recipe = make_recipe(**{"micro_batch_size": None, **fields}) | {"parallel": parallel or {}}
        path.write_text(json.dumps(recipe))
        return path

    return make
