"""One switch that makes every operation here compute by its plain reference, with plain autograd."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

_plain: ContextVar[bool] = ContextVar("ropewalk_plain_references", default=False)


@contextmanager
def references() -> Iterator[None]:
    """Inside it the operations of this room are their references, and nothing runs compiled.

    Holds for this thread (and what it awaits); that nothing runs compiled holds for all threads. A forward
    pass made inside keeps its plain graph, so that its backward pass may run outside, unless that computes
    parts of the forward pass again (activation checkpointing): then it must run inside, and on a CPU.
    """
    # torch.compile cannot have been used where its (slow) import has not happened
    used_compile = "torch._dynamo" in sys.modules
    token = _plain.set(True)
    try:
        with torch.compiler.set_stance("force_eager") if used_compile else nullcontext():
            yield
    finally:
        _plain.reset(token)


def using_references() -> bool:
    """Whether `references()` is in force here."""
    return not torch.compiler.is_compiling() and _plain.get()
