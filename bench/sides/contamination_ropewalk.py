"""Evaluation items in texts by Ropewalk: `JOB.json` has items and texts."""

import json
import sys
import time
from pathlib import Path

from ropewalk.clean.contamination import Contamination, EvaluationItem
from ropewalk.clean.step import Texts


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    items = [EvaluationItem(**{**item, "choices": tuple(item["choices"])}) for item in job["items"]]
    step = Contamination(items)
    step.map(Texts(["what it makes once is not counted"]))
    start, found = time.process_time(), []
    for begin in range(0, len(job["texts"]), 500):
        table = step.map(Texts(job["texts"][begin : begin + 500]))
        found += [begin + i for i, hit in enumerate(table["contaminated"].to_pylist()) if hit]
    print("RESULT " + json.dumps({"processor_seconds": time.process_time() - start, "found": found}))


if __name__ == "__main__":
    main()
