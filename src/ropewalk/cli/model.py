"""Loading a model for the commands that talk to one."""

from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ropewalk.model import Transformer

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Type of the computation; auto: bfloat16 where it is fast."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto: a GPU where there is one.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")]


def _options_of_drawing(
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from this share of the probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Draw from tokens this likely relative to the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens already seen become less likely.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
) -> None: ...


def with_drawing(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of how tokens are drawn, in the place of its `**drawing`."""
    own = [p for p in signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = signature(_options_of_drawing).parameters.values()
    command.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    return command


def load(source: str, dtype: str, device: str) -> tuple["Transformer", Any]:
    """A model and its tokenizer, on the device and in the type that suit this machine."""
    from ropewalk.model import load_model, load_tokenizer
    from ropewalk.recipe import Machine

    machine = Machine.here()
    if device == "auto":
        device = "cuda" if machine.gpu else "cpu"
    if dtype == "auto":
        fast = machine.gpu_bfloat16 if device == "cuda" else machine.cpu_bfloat16
        dtype = "bfloat16" if fast else "float32"
    model = load_model(source, dtype=dtype, device=device)
    model.eval()
    return model, load_tokenizer(source)
