"""`ropewalk chat`: a conversation in the terminal, or with each line of standard input."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ropewalk.cli.model import Device, Dtype, MaxNewTokens, Stop, load, with_drawing
from ropewalk.cli.options import Json, ModelSource, print_json

if TYPE_CHECKING:
    from ropewalk.serve import Chat

FENCE = '"""'
HELP = f"Several lines: {FENCE} alone on a line before and after them. /reset forgets, /exit or Ctrl-D ends."


@with_drawing
def command(
    model: ModelSource,
    system: Annotated[
        str | None, typer.Option(help="System message, kept for the whole conversation.")
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
    **drawing: Any,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit ends it."""
    conversation = chat(
        model,
        system,
        dtype=dtype,
        device=device,
        out=None if json else sys.stdout,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        **drawing,
    )
    if json:
        print_json({"messages": conversation.messages, "dropped": conversation.dropped})


def chat(
    source: str,
    system: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    out: TextIO | None = sys.stdout,
    **sampling: Any,
) -> "Chat":
    """Load the model at `source`, talk to it with standard input and `out`; the conversation at its end.

    `sampling` is what `ropewalk.serve.Chat` takes: temperature, top_p, max_new_tokens, ...
    """
    from ropewalk.serve import Chat

    model, tokenizer = load(source, dtype, device)
    conversation = Chat(model, tokenizer, system, **sampling)
    talk(conversation, sys.stdin, out)
    return conversation


def talk(chat: "Chat", source: TextIO, out: TextIO | None) -> None:
    """Answer every message of `source`, streaming to `out`, until it ends or says /exit."""
    from ropewalk.errors import UserError

    interactive = source.isatty() and out is not None
    if interactive:
        print(HELP, file=out)
    for message in messages(source, interactive):
        if message in ("/exit", "/quit"):
            break
        if message == "/reset":
            chat.reset()
            continue
        if message == "/help":
            print(HELP, file=out or sys.stderr)
            continue
        try:
            answer(chat, message, out)
        except UserError as error:  # the message was too long: the conversation goes on
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)


def answer(chat: "Chat", message: str, out: TextIO | None) -> None:
    """Stream one answer; Ctrl-C breaks it off, and what was said so far is kept."""
    pieces = chat.say(message)
    try:
        for piece in pieces:
            if out is not None:
                print(piece, end="", flush=True, file=out)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()  # type: ignore[attr-defined]
    if out is not None:
        print(file=out, flush=True)
    if chat.notice:
        print(f"({chat.notice})", file=sys.stderr)


def messages(source: TextIO, interactive: bool) -> Iterator[str]:
    """One message a line; lines between two fences are one message. Empty lines are none."""
    if interactive:
        import readline  # noqa: F401  (gives input() its history and line editing)

    block: list[str] | None = None
    while True:
        if interactive:
            try:
                line = input("... " if block is not None else "> ")
            except EOFError:
                print()
                return
        else:
            line = source.readline()
            if not line:
                break
        line = line.rstrip("\n")
        if line.strip() == FENCE:
            if block:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif line.strip():
            yield line.strip()
    if block:
        yield "\n".join(block)
