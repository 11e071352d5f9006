"""Trains many recipes in one set of processes: `python worker.py JOBS.json` with torchrun's variables."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from ropewalk.train import entry

jobs = json.loads(Path(sys.argv[1]).read_text())
for name, (call, arguments) in jobs.items():
    result = getattr(entry, call)(*arguments)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).with_name(f"{name}.result").write_text(json.dumps(asdict(result), default=str))
