"""Checkpoints that are whole or not there, and that prove it.

    step-00000100/
      model/         a Hugging Face directory, or a PEFT adapter directory
      state/         safetensors (optimizer, RNG; one for each process), state.json (step, position, ...)
      MANIFEST.json  size and SHA-256 of every file, written last

A checkpoint is written under a temporary name, fsynced and renamed (`saving`). Nothing in it is pickled: a
checkpoint from elsewhere can be wrong, but it cannot run code.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.files import atomic_write, sha256

FORMAT = 1
NAME = re.compile(r"step-\d{8,}")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What is not tensors in the state of a checkpoint that was verified."""
    state: dict[str, Any] = json.loads((checkpoint / "state" / "state.json").read_text(encoding="utf-8"))
    return state


def newest_valid_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is as it was written, and a warning for each one skipped.

    None where there is no checkpoint. Raises RopewalkError where there are some and all are damaged.
    """
    warnings: list[str] = []
    for checkpoint in reversed(list_checkpoints(run / "checkpoints")):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, warnings
        warnings.append(f"{damage}; checkpoint {checkpoint.name} is not used")
    if warnings:
        raise RopewalkError(
            "; ".join(warnings) + "; no whole checkpoint is left, so train again from the start"
        )
    return None, warnings


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoint directories, oldest first, damaged ones included and half-written ones not."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was measured."""
    losses = {path: loss for path in list_checkpoints(folder) if (loss := _validation_loss(path)) is not None}
    return min(losses, key=lambda path: losses[path]) if losses else None


def note_validation(checkpoint: Path, loss: float) -> None:
    """Adds a validation loss that was measured after the checkpoint was written."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))
    atomic_write(checkpoint / "MANIFEST.json", _sealed({**manifest, "validation_loss": loss}))


def write_manifest(
    checkpoint: Path, step: int, validation_loss: float | None, known: Mapping[str, dict[str, Any]]
) -> None:
    """MANIFEST.json for all files that are there; the entries of some may be `known` already."""
    names = [str(path.relative_to(checkpoint)) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = {name: known.get(name) or file_entry(checkpoint / name) for name in names}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "validation_loss": validation_loss,
        "files": files,
    }
    (checkpoint / "MANIFEST.json").write_text(_sealed(manifest))


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every size and hash is right."""
    try:
        return _damage(checkpoint)
    except OSError as error:  # of a disk with bad blocks, say
        return f"{error.filename or checkpoint}: cannot be read ({error.strerror})"


def _damage(checkpoint: Path) -> str | None:
    path = checkpoint / "MANIFEST.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        said = manifest.pop("sha256")
        files = {
            checkpoint / name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        if manifest["format"] != FORMAT:
            return f"{path}: format {manifest['format']} is not {FORMAT}, which this version reads"
    except FileNotFoundError:
        return f"{path}: missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: not a manifest"
    if said != _digest(manifest):
        return f"{path}: does not match its own hash"
    for file, (size, digest) in files.items():
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: has {file.stat().st_size:,} bytes instead of {size:,}"
        if sha256(file) != digest:
            return f"{file}: does not match its hash in MANIFEST.json"
    return None


def random_state(rank: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch's (process by process), Python's and numpy's global generators: tensors and JSON."""
    tensors = {_of_rank("random.cpu", rank): torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(tensors: dict[str, Tensor], values: dict[str, Any], rank: int = 0) -> None:
    """Restores what `random_state` gave; of a process or a GPU that was not there, nothing."""
    if (name := _of_rank("random.cpu", rank)) in tensors:
        torch.set_rng_state(tensors[name].clone())
    if f"random.cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"].clone())
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(values["numpy"]))


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def prune(folder: Path, keep: int) -> None:
    """Deletes all checkpoints but the `keep` newest and the best by validation loss."""
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[:-keep]:
        if path != best:
            doomed = path.with_name(f".{path.name}.tmp")  # a kill in the middle leaves no half checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, int | float) else None


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text, with a hash of itself: a flipped byte in it must not go unnoticed either."""
    manifest.pop("sha256", None)
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2) + "\n"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
