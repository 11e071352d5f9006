"""Near duplicates beside datatrove's MinHash: documents a second of one processor, from JSON lines to JSON
lines. Run by data.py.

Both cut the same documents of 2.7 kB into runs of five words and compare them in the same bands and rows.
Both read and write the same files in one process, datatrove in its four stages: with its own words (spaCy's
English rules), and once more with words split at white space, which it does not offer and which
costs almost nothing. Its pairs are not checked; ours are, which is counted in.
"""

import itertools
import json
import random
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from environments import peer_python
from measure import Measurement, interleave, measure

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
SIZE = 2700
RUNS, ORIGINALS = 5, 2000
THRESHOLD, RECALL, WORDS = 0.8, 0.95, 5
BANDS, ROWS = 17, 8
"""What Ropewalk makes of threshold and recall."""
CHANGED = {0.0: 100, 0.01: 200, 0.02: 200, 0.1: 200}
"""Share of the words changed -> so many documents."""


def documents() -> list[dict[str, Any]]:
    """ORIGINALS of real text, and some of them again with some words changed, shuffled."""
    text = "".join((SHARED / f"wikitext2_{part}.txt").read_text() for part in ("valid", "test"))
    for name in ("rust_book", "peps"):
        with (SHARED / f"{name}.jsonl").open() as file:
            text += "".join(json.loads(line)["text"] for line in file)
    rng = random.Random(0)
    found = [
        {"id": f"text-{number}", "text": text[number * SIZE : (number + 1) * SIZE]}
        for number in rng.sample(range(len(text) // SIZE), ORIGINALS)
    ]
    for share, count in CHANGED.items():
        for original in rng.sample(found[:ORIGINALS], count):
            words = re.split(r"(\s+)", original["text"])
            new = [rng.choice(words) if word.strip() and rng.random() < share else word for word in words]
            found.append({"id": f"{original['id']}-{share}-{len(found)}", "text": "".join(new)})
    rng.shuffle(found)
    return found


def write(records: list[dict[str, Any]], directory: Path, files: int = 4) -> None:
    directory.mkdir(parents=True)
    for number in range(files):
        lines = [json.dumps(record) + "\n" for record in records[number::files]]
        (directory / f"{number}.jsonl").write_text("".join(lines))


def cases(directory: Path) -> list[dict[str, Any]]:
    """See data.py. `ours` and `peer_value` are documents a second of processor time, imports left out."""
    records = documents()
    write(records, directory / "in")
    datatrove = peer_python("datatrove", HERE)

    numbers = itertools.count()

    def side(name: str, python: Path | str, **more: Any) -> Measurement:
        job = {
            "in": str(directory / "in"),
            "out": str(directory / f"out-{next(numbers)}"),
            "threshold": THRESHOLD,
            "recall": RECALL,
            "words": WORDS,
            "bands": BANDS,
            "rows": ROWS,
            **more,
        }
        program = HERE / "sides" / f"duplicates_{name.partition('-')[0]}.py"
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return measure(name, [python, program, json.dumps(job)], threads)

    runs = interleave(
        RUNS,
        {
            "ropewalk": lambda: side("ropewalk", sys.executable),
            "datatrove": lambda: side("datatrove", datatrove, split=False),
            "datatrove-split": lambda: side("datatrove-split", datatrove, split=True),
        },
    )
    ours = _speed(runs, "ropewalk", len(records))
    return [
        {
            "case": "near-duplicates",
            "peer": peer,
            "ours": ours,
            "peer_value": (theirs := _speed(runs, peer, len(records))),
            "unit": "documents/s/core",
            "ratio": ours / theirs,
            "runs": [
                {
                    "side": run.side,
                    **{**run.result, "kept": len(run.result["kept"])},
                    "peak_bytes": run.peak_bytes,
                }
                for run in runs
                if run.side in ("ropewalk", peer)
            ],
        }
        for peer in ("datatrove", "datatrove-split")
    ]


def _speed(runs: list[Measurement], side: str, count: int) -> float:
    return count / statistics.median(run.result["processor_seconds"] for run in runs if run.side == side)
