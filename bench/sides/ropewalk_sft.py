"""Ropewalk's side of a fine-tuning benchmark: one recipe, trained once. Argument: a JSON file, the job."""

import importlib.metadata
import json
import math
import sys
from pathlib import Path

import ropewalk as rw
from ropewalk.model.safetensors_file import read_header

WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = rw.train(job["recipe"], progress=False)
    records = [json.loads(line) for line in (result.run / "metrics-train.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    adapter = read_header(result.run / "checkpoints" / f"step-{result.step:08d}" / "model" / WEIGHTS)
    values = {
        "versions": {
            name: importlib.metadata.version(name) for name in ("ropewalk", "torch", "transformers")
        },
        "seconds": [record["seconds"] for record in steps],
        "tokens": [record["tokens"] for record in steps],
        "scored_tokens": [record["scored_tokens"] for record in steps],
        "losses": [record["loss"] for record in steps],
        "trainable": sum(math.prod(tensor.shape) for tensor in adapter.values()),
        "settings": job["recipe"]["train"],
    }
    print("RESULT " + json.dumps(values))


if __name__ == "__main__":
    main()
