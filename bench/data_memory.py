"""The memory of preparing far more text than there is memory: python bench/data_memory.py --gigabytes 20

Generated documents of 2.7 kB are read, and equal ones left out, as `ropewalk data rules` does: reading, and a
step that compares all documents. With --near, near duplicates too, which takes about two minutes a gigabyte
and core. The figure is the sum over all processes of their resident memory, its highest value. Run by data.py
with 2 GB.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import MARK, as_json, machine, measure

SIZE = 2700
LIMIT = 3e9
"""Bytes that 20 GB may take."""


def generate(directory: Path, gigabytes: float) -> None:
    """Files of 1 GB; a tenth of the documents are others once more."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    pieces = [" ".join(rng.choices(vocabulary, k=45)) for _ in range(20_000)]
    directory.mkdir(parents=True)
    documents = itertools.count()
    for number in range(-(-int(gigabytes * 10) // 10)):
        left = min(1.0, gigabytes - number) * 1e9
        with open(directory / f"{number:03}.jsonl", "w") as file:
            while left > 0:
                i = next(documents)
                own = random.Random(i - 7 if i % 10 == 9 else i)
                line = json.dumps({"text": " ".join(own.choices(pieces, k=9))}) + "\n"
                left -= file.write(line)


def cases(directory: Path, gigabytes: float = 2.0, near: bool = False) -> list[dict[str, Any]]:
    generate(directory / "text", gigabytes)
    recipe = {
        "name": "memory",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "none"},
        "data": {
            "train": [{"path": str(directory / "text" / "*.jsonl")}],
            "directory": str(directory / "prepared"),
            "clean": {"duplicates": ["exact", "near"] if near else ["exact"]},
        },
        "train": {"steps": 1},
    }
    (directory / "recipe.json").write_text(json.dumps(recipe))
    program = (
        "import json, sys; from ropewalk.data.entry import judge;"
        "from ropewalk.look.documents import judgement;"
        f"print({MARK!r} + json.dumps(judgement(judge(sys.argv[1]))))"
    )
    found = measure("ropewalk", [sys.executable, "-c", program, directory / "recipe.json"], timeout=7200)
    print(found.result, file=sys.stderr)
    return [
        {
            "case": f"{'near and equal' if near else 'equal'} documents of {gigabytes:g} GB, highest memory",
            "peer": "the 3 GB that 20 GB may take",
            "ours": found.peak_bytes / 1e9,
            "peer_value": LIMIT / 1e9,
            "unit": "GB",
            "ratio": LIMIT / found.peak_bytes,
            "seconds": found.seconds,
        }
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--near", action="store_true", help="near duplicates too")
    parser.add_argument("--directory", type=Path, help="where there is room for twice the text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        print(as_json([*cases(Path(place), options.gigabytes, options.near), machine()]))
