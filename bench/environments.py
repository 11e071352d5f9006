"""Peer libraries, each set in an environment of its own that nothing else sees."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_TRL = ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]
PEERS: dict[str, list[list[str]]] = {
    # torch first and alone: otherwise a peer's pin may choose another build of it
    "trl": [["torch==2.13.0"], [*_TRL, "bitsandbytes==0.50.2"]],
    "litgpt": [["torch==2.13.0"], ["litgpt==0.5.13", "transformers==4.57.6", "requests"]],
    # the last torch and torchao in which it can be imported
    "torchtune": [["torch==2.8.0"], ["torchao==0.12.0", "torchtune==0.6.1"]],
    "liger": [["torch==2.13.0"], [*_TRL, "liger-kernel"]],
    "unsloth": [["unsloth"]],
    # spacy is its word tokenizer for English; a blank pipeline, so that nothing is downloaded
    "datatrove": [
        [
            "datatrove==0.10.1",
            "spacy==3.8.18",
            "nltk==3.10.4",
            "xxhash<4",
            "regex",
            "orjson",
            "tokenizers",
        ]
    ],
}
GPU_ONLY = {"liger", "unsloth"}
"""They bring Triton kernels and some gigabytes with them, and do nothing without a GPU."""


def peer_python(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment under `folder`, made on first use (minutes, about 1.5 GB)."""
    home = folder / f".venv-{name}"
    python, finished = home / "bin" / "python", home / "finished"
    wanted = repr(PEERS[name])
    if not finished.is_file() or finished.read_text() != wanted:
        print(f"making {home} ...", flush=True)
        if not python.is_file():
            _call(sys.executable, "-m", "venv", str(home))
        for packages in PEERS[name]:
            install(python, packages)
        finished.write_text(wanted)
    return python


def install(python: Path, packages: Sequence[str]) -> None:
    """pip install into the interpreter's environment."""
    _call(str(python), "-m", "pip", "install", "--quiet", *packages)


def _call(*command: str) -> None:
    """Raises RuntimeError with the command's last words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
