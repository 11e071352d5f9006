"""Runs the tests of the layouts and writes what they measured into docs/parallelism.md."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "parallelism.md"
BEGIN, END = "<!-- parity table: begin -->\n", "<!-- parity table: end -->\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        tests = [sys.executable, "-m", "pytest", "-q", str(HERE / "test_layouts.py"), *sys.argv[1:]]
        status = subprocess.run(tests, env=os.environ | {"ROPEWALK_PARITY_ROWS": str(rows)}).returncode
        if status:
            return status
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2], encoding="utf-8")
    return 0


def table(rows: list[list]) -> str:
    lines = ["| processes | `parallel` | model | loss | gradient norm |", "|---|---|---|---|---|"]
    for processes, layout, what, loss, norm in rows:
        said = ", ".join(f"{name}: {value}" for name, value in layout.items())
        lines.append(f"| {processes} | `{said}` | {what} | {loss:.1e} | {norm:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
