"""What is measured on the way: the validation loss, and answers to the prompt panel."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ropewalk.data import Loader
from ropewalk.evaluate import run_panel
from ropewalk.files import atomic_write
from ropewalk.model import Transformer
from ropewalk.parallel import World
from ropewalk.train.objective import loss_sum, without_padding


@torch.no_grad()
def validation_loss(
    model: Transformer,
    loader: Loader,
    *,
    rows: int,
    micro_batch: int,
    chunk: int,
    device: torch.device,
    compiled: bool = False,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> tuple[float, int] | None:
    """(mean loss per scored token, scored tokens) over the loader's first `rows` rows, each at most once.

    Processes take turns with the micro-batches. None where `stop()` became true on the way.
    """
    world = world or World()
    rows, parts = min(rows, loader.rows_per_epoch(0)), world.layout.data
    unit = math.lcm(64, world.layout.whole)
    total, scored = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model, compiled):
        for first in range(0, rows, micro_batch * parts):
            if stop():
                return None
            start = first + world.part * micro_batch
            count = max(1, min(micro_batch, rows - start))
            batch = without_padding(loader.batch(min(start, rows - 1), count), unit)
            found = loss_sum(model, batch, chunk)  # all take part in each: parts of the model are sent around
            if start < rows:
                scored += int((batch.labels != -100).sum())
                total += found
    total = world.sum_along("pipeline", total)  # the others of a pipeline have 0
    (whole,), (seen,) = world.total_of_tokens([total.item()]), world.total([scored])
    return whole / max(1, seen), int(seen)


def write_samples(
    model: Transformer,
    tokenizer: Any,
    prompts: tuple[str, ...],
    path: Path | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    compiled: bool = False,
) -> None:
    """Greedy answers to the prompt panel, one JSON line `{prompt, answer}` each; None: not written."""
    with evaluating(model, compiled):
        # fully_shard keeps what it first gathers weights into: made while generating, in inference mode, it
        # could not be trained with
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.embed.weight.device))
        samples = run_panel(model, tokenizer, prompts, max_new_tokens, batch_size)
    if path is not None:
        atomic_write(
            path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        )


@contextmanager
def evaluating(model: Transformer, compiled: bool) -> Iterator[None]:
    """Evaluation mode inside, in which nothing is drawn from torch's generators.

    Blocks that are `compiled` are so for the shapes of training: here they run as they were written.
    """
    training = model.training
    # set_stance imports torch.compile's machinery, 2.5 s and 73 MB: not for those who do not use it
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eager:
        model.eval()
        try:
            yield
        finally:
            model.train(training)
