"""The autopsy of a step: what its documents are, and which of them has a loss that the others have not."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ropewalk.data import Batch
from ropewalk.errors import UserError
from ropewalk.model import Transformer, load_model
from ropewalk.ops import linear_logprobs
from ropewalk.recipe import Recipe, load_recipe, resolve
from ropewalk.track import RunDirectory
from ropewalk.train.build import DTYPES, build, load_run_tokenizer
from ropewalk.train.checkpoint import find_damage, list_checkpoints
from ropewalk.train.entry import same_data
from ropewalk.train.job import rows_of, total_steps
from ropewalk.train.spikes import Spikes, robust_scores
from ropewalk.train.validate import evaluating

OUTLIER = 3.5
"""Modified z-score above which Iglewicz and Hoaglin (1993) call a value an outlier."""
SHOWN = 200
"""Characters of a text."""


@dataclass(frozen=True)
class DocumentLoss:
    """A document in a step's rows. `loss` is its mean per scored token; None where that is not finite."""

    id: str
    """where it came from: source, file and line"""
    loss: float | None
    scored_tokens: int
    tokens: int
    outlier: bool
    text: str
    """its beginning"""


@dataclass(frozen=True)
class Autopsy:
    run: Path
    step: int
    batch: int
    """number of the step's batch in the order of the data, from 0"""
    left_out: bool
    """whether a rollback has left it out since"""
    weights: str
    """the checkpoint that the losses were computed with, or where the first weights came from"""
    updates_missing: int
    """updates between those weights and the step's"""
    documents: list[DocumentLoss]
    """largest loss first; those without scored tokens last"""


def spike(run: str | Path, step: int) -> Autopsy:
    """The documents of a step, each with its own loss by the newest whole checkpoint before that step.

    Without one, by the weights that the run began with. Raises UserError where the run has no such step.
    """
    directory = RunDirectory.open(run)
    recipe = resolve(load_recipe(directory.path / "recipe.yaml")).recipe
    tokenizer = load_run_tokenizer(recipe)
    loader = rows_of(recipe, same_data(directory, recipe)[0], tokenizer)
    steps = total_steps(recipe, loader)
    if not 1 <= step <= steps:
        raise UserError(f"--step {step}: the run has the steps 1 to {steps}")
    rollbacks = [record for record in directory.read() if record["kind"] == "rollback"]
    spikes = Spikes(1, left_out=rollbacks[-1]["left_out"] if rollbacks else [])
    gone = [record["batch"] for record in rollbacks if record["from"] == step]
    number = gone[-1] if gone else spikes.batch(step)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, weights, done = weights_before(directory, recipe, step, device)
    assert recipe.train.batch_size is not None
    batch = loader.batch(number * recipe.train.batch_size, recipe.train.batch_size)
    rows = recipe.train.micro_batch_size or 1
    found: list[tuple[str, float, int, torch.Tensor]] = []
    with evaluating(model, compiled=False):
        for first in range(0, len(batch.tokens), rows):
            found += document_losses(model, batch.rows(first, first + rows), recipe.train.loss_chunk)
    return Autopsy(
        directory.path, step, number, bool(gone), weights, step - 1 - done, _ranked(found, tokenizer)
    )


def weights_before(
    run: RunDirectory, recipe: Recipe, step: int, device: torch.device
) -> tuple[Transformer, str, int]:
    """(model, what its weights are, how many updates they have had) from before the update of `step`."""
    for checkpoint in reversed(list_checkpoints(run.checkpoints_path)):
        done = int(checkpoint.name.removeprefix("step-"))
        if 0 < done < step and find_damage(checkpoint) is None:
            quantize, dtype = recipe.adapt.quantize, DTYPES[recipe.train.precision]
            return load_model(checkpoint, dtype, device, quantize=quantize), checkpoint.name, done
    plain: dict[str, Any] = {"compile": False}
    if recipe.train.precision == "float8":  # which only training uses
        plain |= {"precision": "bfloat16"}
    train = recipe.train.model_copy(update=plain)
    built = build(recipe.model_copy(update={"train": train}), device)
    return built.model, f"the weights at the start ({built.source})", 0


@torch.no_grad()
def document_losses(
    model: Transformer, batch: Batch, chunk: int
) -> list[tuple[str, float, int, torch.Tensor]]:
    """(id, summed loss, scored tokens, token ids) of each document in a few rows, packed as in training."""
    device = model.output_weight.device
    tokens, positions = batch.tokens.to(device), batch.positions.to(device)
    hidden = model(tokens, positions=positions, segments=batch.segments)
    losses = -linear_logprobs(
        hidden.flatten(0, 1),
        model.output_weight,
        batch.labels.flatten(),
        bias=model.output_bias,
        softcap=model.config.final_logit_softcapping,
        chunk=chunk,
    )
    losses = losses.view(batch.labels.shape).double().cpu()
    found = []
    for row, names in enumerate(batch.documents):
        for segment, name in enumerate(names):
            here = batch.segments[row] == segment
            scored = here & (batch.labels[row] != -100)
            found.append((name, float(losses[row, scored].sum()), int(scored.sum()), batch.tokens[row, here]))
    return found


def _ranked(found: list[tuple[str, float, int, torch.Tensor]], tokenizer: Any) -> list[DocumentLoss]:
    means = [total / scored for _, total, scored, _ in found if scored]
    finite = [mean for mean in means if math.isfinite(mean)]
    documents = []
    for name, total, scored, tokens in found:
        mean = total / scored if scored else -math.inf
        bad = scored > 0 and not math.isfinite(mean)
        far = scored > 0 and not bad and robust_scores([mean], finite)[0] > OUTLIER
        text = tokenizer.decode(tokens[: 2 * SHOWN].tolist())[:SHOWN]
        loss = mean if math.isfinite(mean) else None
        order = math.inf if bad else mean
        documents.append((order, DocumentLoss(name, loss, scored, len(tokens), bad or far, text)))
    documents.sort(key=lambda pair: -pair[0])
    return [document for _, document in documents]
