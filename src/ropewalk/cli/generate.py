"""`ropewalk generate`."""

import sys
from typing import Annotated, Any

import typer

from ropewalk.cli.model import Device, Dtype, MaxNewTokens, Stop, load, with_drawing
from ropewalk.cli.options import Json, ModelSource, print_json


@with_drawing
def command(
    model: ModelSource,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to go on with; by default each line of standard input."),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
    **drawing: Any,
) -> None:
    """Continue plain texts, without a chat template."""
    from ropewalk.errors import UserError
    from ropewalk.serve import generate

    texts = prompts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise UserError("nothing to continue: give a text, or lines on standard input")
    loaded, tokenizer = load(model, dtype, device)
    completions = generate(
        loaded, tokenizer, texts, max_new_tokens=max_new_tokens, stop=stop or (), **drawing
    )
    if json:
        answers = [
            {"prompt": text, "text": c.text, "finish_reason": c.finish_reason}
            for text, c in zip(texts, completions, strict=True)
        ]
        print_json({"completions": answers})
        return
    for text, completion in zip(texts, completions, strict=True):
        print(text + completion.text)
