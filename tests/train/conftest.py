"""A small corpus, and a recipe that trains the tiny model on it in a second or two."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

WORDS = (
    "rope walk fibre strand twist long building loose strong spin lay yarn hemp tar sail mast deck".split()
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 3 to 40 words, so that a row of 64 tokens holds one to several."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    random = Random(7)
    with path.open("w") as file:
        for number in range(60):
            text = " ".join(random.choice(WORDS) for _ in range(random.choice((3, 5, 8, 13, 20))))
            file.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, corpus: Path, tiny_llama_dir: Path) -> Callable[..., dict[str, Any]]:
    """`make_recipe(steps=4, adapt={...}, **train fields)`: a recipe whose files are all under tmp_path."""

    def make(
        adapt: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        evaluate: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **train: Any,
    ) -> dict[str, Any]:
        fields = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "threads": 1, "device": "cpu", **train}
        if "epochs" in train or "tokens" in train:
            del fields["steps"]
        return {
            "name": "tiny",
            "seed": 3,
            "runs": str(tmp_path / "runs"),
            "model": model or {"source": str(tiny_llama_dir)},
            "data": {
                "train": [{"path": str(corpus)}],
                "validation_fraction": 0.2,
                "sequence_length": 64,
                "directory": str(tmp_path / "prepared"),
                "workers": 1,
                **(data or {}),
            },
            "adapt": adapt or {},
            "train": {
                "precision": "float32",
                "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, **(optimizer or {})},
                **fields,
            },
            "evaluate": evaluate or {},
        }

    return make


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
