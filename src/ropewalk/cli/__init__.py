"""The front door. In: a command line. Out: one call of a stage room, its answer printed, an exit status.

May import: the stage rooms and `recipe`, inside the command functions only; `--help` imports no torch.
"""

import sys
from collections.abc import Sequence

import typer

from ropewalk.cli import (
    chat,
    data,
    doctor,
    evaluate,
    generate,
    launch,
    parity,
    plan,
    prepare,
    recipe,
    run,
    runs,
    spike,
    train,
)
from ropewalk.cli.options import Commands
from ropewalk.errors import RopewalkError

app = Commands(
    help="One recipe and one command, from raw text to a measured, served language model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in {
    "doctor": doctor.command,
    "prepare": prepare.command,
    "train": train.train,
    "resume": train.resume,
    "launch": launch.command,
    "parity": parity.command,
    "spike": spike.command,
    "eval": evaluate.command,
    "generate": generate.command,
    "chat": chat.command,
    "run": run.command,
}.items():
    app.command(_name)(_command)
for _name, _group in {"data": data, "plan": plan, "runs": runs, "recipe": recipe}.items():
    app.add_typer(_group.app, name=_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit status: 0, 1, 2 or 130."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in words
    try:
        status = app(words, prog_name="ropewalk", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if debug and not hasattr(error, "format_message"):
            raise
        message, status = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        return status


def _explain(error: Exception) -> tuple[str, int]:
    """One message and the exit status for whatever ended a command."""
    if isinstance(error, RopewalkError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # a usage error of click, whose module moves between typer versions
        path = getattr(getattr(error, "ctx", None), "command_path", "ropewalk")
        return f"{error.format_message().rstrip('.')}; see: {path} --help", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}", 1
    return f"{type(error).__name__}: {error} (unexpected; --debug shows the traceback)", 1
