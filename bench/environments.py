"""Peer libraries, each set in an environment of its own that nothing else sees."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS: dict[str, list[list[str]]] = {
    # torch first and alone: otherwise a peer's pin may choose another build of it
    "trl": [
        ["torch==2.13.0"],
        ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"],
    ],
}


def peer_python(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment under `folder`, made on first use (minutes, about 1.5 GB)."""
    home = folder / f".venv-{name}"
    python, finished = home / "bin" / "python", home / "finished"
    wanted = repr(PEERS[name])
    if not finished.is_file() or finished.read_text() != wanted:
        print(f"making {home} ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        for packages in PEERS[name]:
            install(python, packages)
        finished.write_text(wanted)
    return python


def install(python: Path, packages: Sequence[str]) -> None:
    """pip install into the interpreter's environment."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
