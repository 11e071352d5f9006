"""One process that meets others: `python preflight_worker.py CASES.json`, a list of cases by rank."""

import json
import os
import sys
import time
from pathlib import Path

from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.parallel import preflight

case = json.loads(Path(sys.argv[1]).read_text())[int(os.environ["RANK"])]
preflight.SEEN = 1.0
if "clock" in case:
    preflight.time.time = lambda: case["clock"]
if "host" in case:
    preflight.socket.gethostname = lambda: case["host"]
began = time.monotonic()
try:
    preflight.meet("cpu", Layout(), Path(case["folder"]), lambda whole: case["versions"])
    said = ""
except UserError as error:
    said = str(error)
answer = {"said": said, "seconds": time.monotonic() - began}
Path(sys.argv[1]).with_name(f"{os.environ['RANK']}.answer").write_text(json.dumps(answer))
