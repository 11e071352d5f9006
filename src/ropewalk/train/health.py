"""Errors that stop a run before it does harm, and that say where to look."""

import torch

from ropewalk.adapt import adapter_parameters
from ropewalk.data import Batch
from ropewalk.errors import RopewalkError
from ropewalk.model import Transformer
from ropewalk.ops import QuantizedTensor
from ropewalk.parallel import local

SHOWN = 12


def stopped(
    model: Transformer, step: int, what: str, parts: list[Batch], updated: bool = False
) -> RopewalkError:
    """For a step with a spike, or whose loss or gradient is not finite: `what` says which.

    `parts` are the micro-batches to blame. `updated`: weights were changed already, as
    train.optimizer.in_backward does.
    """
    harm = (
        "some weights were updated with it"
        if updated
        else "stopped before the update, so the weights are unharmed"
    )
    broken = None if updated else broken_parameter(model)
    if broken is not None:
        return RopewalkError(
            f"step {step}: the model's weight {broken} is not finite; the weights are damaged"
        )
    return RopewalkError(
        f"step {step}: {what}; {harm}; "
        f"it came with {named_documents(parts)}; look at them (ropewalk spike RUN --step {step}), or lower "
        "train.optimizer.learning_rate"
    )


def broken_parameter(model: Transformer) -> str | None:
    """The first parameter that holds a NaN or an infinity; None where all are sound.

    (Quantized weights are frozen, and were finite when they were made.)
    """
    plain = ((name, p) for name, p in model.named_parameters() if not isinstance(p, QuantizedTensor))
    return next((name for name, p in plain if not bool(torch.isfinite(local(p)).all())), None)


def no_gradient(model: Transformer) -> RopewalkError:
    """For a first step in which every gradient is zero: it would train nothing, however long it ran."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = adapter_parameters(model).values()
    if not trained:
        why = "every parameter is frozen; set adapt.method to lora or full"
    elif adapters and not any(local(p).any() for p in adapters):
        why = "all adapter weights are zero, which no gradient can leave"
    elif not any(local(p).any() for p in trained):
        why = "all trained weights are zero"
    else:
        why = "the loss does not depend on the trained weights; is the output head or a norm all zeros?"
    return RopewalkError(f"step 1: the gradient is zero, so nothing would be learned: {why}")


def named_documents(parts: list[Batch]) -> str:
    """`document a, b, c and 4 more`: the documents of some rows, for a message."""
    names = [name for part in parts for row in part.documents for name in row]
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"document{'s' if len(names) != 1 else ''} {shown}"
