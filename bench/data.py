"""Cleaning and feeding data beside other tools: python bench/data.py --out bench/results/data.json

Each `data_*.py` here has `cases(directory)`: what it needs it makes under the directory, and it returns a
list of {case, peer, ours, peer_value, unit, ratio}, medians over interleaved runs. A ratio above 1 speaks for
Ropewalk whatever the unit. `--only duplicates` runs one module.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = ["rules", "duplicates", "contamination", "loader", "tokenize", "memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--only", choices=MODULES, action="append", help="a module; may be given several times"
    )
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from measure import as_json, machine

    there = [name for name in MODULES if (HERE / f"data_{name}.py").is_file()]
    found: list[dict[str, Any]] = []
    for name in arguments.only or there:
        module = importlib.import_module(f"data_{name}")
        with tempfile.TemporaryDirectory() as directory:
            found += [{**case, "machine": machine()} for case in module.cases(Path(directory))]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(as_json(found), encoding="utf-8")
    for case in found:
        ratio = "" if case["ratio"] is None else f", {case['ratio']:.3g} times"
        print("{case} against {peer}: {ours:.4g} to {peer_value:.4g} {unit}".format(**case) + ratio)


if __name__ == "__main__":
    main()
