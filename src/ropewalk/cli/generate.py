"""`ropewalk generate`."""

import sys
from typing import Annotated

import typer

from ropewalk.cli.model import (
    Device,
    Dtype,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    load,
)
from ropewalk.cli.options import Debug, Json, ModelSource, print_json


def command(
    model: ModelSource,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to go on with; by default each line of standard input."),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue plain texts, without a chat template."""
    from ropewalk.errors import UserError
    from ropewalk.serve import generate

    texts = prompts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise UserError("nothing to continue: give a text, or lines on standard input")
    loaded, tokenizer = load(model, dtype, device)
    completions = generate(
        loaded,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
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
