"""Training, top to bottom: pretraining from scratch, full fine-tuning and LoRA are the same loop.

What a step computes depends on the recipe, the data's fingerprint and the step's number only. All the rest
(optimizer, generators, position) is in the checkpoint, so that a resumed run repeats the uninterrupted one.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ropewalk.data import Batch, prefetch
from ropewalk.errors import RopewalkError
from ropewalk.parallel import reduce_gradients
from ropewalk.track import RunDirectory
from ropewalk.train.checkpoint import checkpoint_name, note_validation
from ropewalk.train.flops import TokenCounts
from ropewalk.train.health import broken_parameter, named_documents, no_gradient, not_finite
from ropewalk.train.job import Job
from ropewalk.train.objective import loss_sum, without_padding
from ropewalk.train.progress import Reporter
from ropewalk.train.signals import StopRequest
from ropewalk.train.validate import validation_loss, write_samples


def run_loop(job: Job, run: RunDirectory, reporter: Reporter, stop: StopRequest) -> list[float]:
    """Trains from `job.step` to `job.steps`, or until `stop`: the losses of the steps done here.

    What is due at a step (validation, samples, checkpoint) is done at the top of the loop, before the next
    step: so a run that stopped in between makes up for it when it goes on.
    """
    train = job.recipe.train
    losses: list[float] = []
    batches = prefetch(
        job.loader,
        job.step * job.rows + job.world.part * job.own_rows,
        job.own_rows,
        job.steps - job.step,
        stride=job.rows,
        pin=job.device.type == "cuda",
    )
    with closing(batches):
        while True:
            by_clock = stop.agree(job.save_is_due())
            if stop:
                break
            if job.step == 0 or job.due(train.evaluate_every):
                evaluate(job, run, reporter, stop)
            if job.due(train.sample_every) and not stop:
                sample(job, run)
            if job.step > 0 and (by_clock or job.due(train.checkpoint_every)) and not stop:
                checkpoint(job, run)
            if job.step == job.steps or stop:
                break
            job.step += 1
            record = train_step(job, batches)
            losses.append(record["loss"])
            logged = job.step == 1 or job.due(train.log_every)
            if logged:
                run.log(record)
            reporter.step(record, line=logged)
    if stop:
        checkpoint(job, run)
    return losses


def train_step(job: Job, batches: Iterator[Batch]) -> dict[str, Any]:
    """One optimizer step: its record. Nothing is updated where the loss or a gradient is not finite."""
    train, model, optimizer = job.recipe.train, job.built.model, job.optimizer
    began = time.perf_counter()
    job.at(job.step, "waiting for data")
    batch = next(batches)
    waited = time.perf_counter() - began
    job.at(job.step, "forward and backward")
    counts = TokenCounts.of(batch, model.config)
    parts = [batch.rows(row, row + job.micro_rows) for row in range(0, job.own_rows, job.micro_rows)]
    counts = counts.total(job.world)
    if not counts.scored:
        raise RopewalkError(f"step {job.step}: nothing is scored in {named_documents(parts)}; see data.score")

    rate = job.learning_rate()
    optimizer.begin(rate)
    if train.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # the gradients that the last replays made are used up
    sums = []
    for part in parts:
        reduce_gradients(model, job.world, last=part is parts[-1])
        sums.append(backward(job, part, counts.scored))
    measured = torch.stack([*sums, optimizer.gradient_norm().to(job.device)])
    *part_sums, gradient_norm = measured.tolist()  # the step's one wait for the device
    loss = job.world.total_of_tokens([math.fsum(part_sums)])[0] / counts.scored
    if not math.isfinite(loss) or not math.isfinite(gradient_norm):
        guilty = [part for part, value in zip(parts, part_sums, strict=True) if not math.isfinite(value)]
        updated = train.optimizer.in_backward and math.isfinite(loss)
        raise not_finite(model, job.step, loss, gradient_norm, guilty or parts, updated)
    if job.step == 1 and gradient_norm == 0.0:
        raise no_gradient(model)

    job.at(job.step, "update")
    if train.clip and gradient_norm > train.clip:
        optimizer.scale_gradients(train.clip / gradient_norm)
    optimizer.step(rate)
    values = {"loss": loss, "gradient_norm": gradient_norm, "learning_rate": rate}
    return job.meter.record(job.step, counts, time.perf_counter() - began, waited, values)


def backward(job: Job, part: Batch, scored: int) -> Tensor:
    """Adds a micro-batch's gradients; its loss summed over scored tokens.

    Divided by the scored tokens of the whole step, so that accumulated steps equal one large batch exactly.
    """
    if not job.recipe.train.compile:  # compiled code wants one shape
        part = without_padding(part, math.lcm(64, job.world.layout.whole))
    loss = loss_sum(job.built.model, part, job.recipe.train.loss_chunk)
    mean = loss / scored
    balance = job.built.model.auxiliary_loss()
    if balance is not None:  # a mean over rows: micro-batches share it
        mean = mean + balance * (len(part.tokens) / job.rows)
    if job.recipe.train.optimizer.in_backward:
        whole = job.world.total_of_tokens([loss.item()])[0]  # no process alone may leave out a backward pass
        if not math.isfinite(whole):
            return loss.detach()  # backward would update the weights with it
    if mean.requires_grad:  # a frozen model is reported with the other zero gradients
        mean.backward()
    return loss.detach()


def evaluate(job: Job, run: RunDirectory, reporter: Reporter, stop: StopRequest) -> None:
    """The validation loss at this step, unless it is known already or `stop` comes first."""
    if job.validation is None or job.step in job.validation_losses:
        return
    job.at(job.step, "validation")
    began = time.perf_counter()
    measured = validation_loss(
        job.built.model,
        job.validation,
        rows=job.recipe.train.evaluate_rows,
        micro_batch=job.micro_rows,
        chunk=job.recipe.train.loss_chunk,
        device=job.device,
        compiled=job.recipe.train.compile,
        stop=lambda: bool(stop),
        world=job.world,
    )
    if measured is None:
        return
    loss, scored = measured
    if not math.isfinite(loss):
        broken = broken_parameter(job.built.model)
        why = f"the model's weight {broken} is not finite" if broken else "the weights are finite"
        raise RopewalkError(f"step {job.step}: the validation loss is {loss}; {why}")
    job.validation_losses[job.step] = loss
    seconds = round(time.perf_counter() - began, 3)
    run.log(
        {"kind": "validation", "step": job.step, "loss": loss, "scored_tokens": scored, "seconds": seconds}
    )
    reporter.say(f"step {job.step}/{job.steps}  validation loss {loss:.4f}")


def sample(job: Job, run: RunDirectory) -> None:
    """Answers to the prompt panel, in samples/."""
    job.at(job.step, "samples")
    panel = job.recipe.evaluate
    if panel.prompts:
        write_samples(
            job.built.model,
            job.built.tokenizer,
            panel.prompts,
            run.samples_path / f"step-{job.step:08d}.jsonl" if job.world.first else None,
            max_new_tokens=panel.max_new_tokens,
            batch_size=panel.batch_size,
            compiled=job.recipe.train.compile,
        )


def checkpoint(job: Job, run: RunDirectory) -> None:
    """A checkpoint of this step; one that is there already only learns its validation loss."""
    job.at(job.step, "checkpoint")
    loss = job.validation_losses.get(job.step)
    if job.saved is None or job.saved.name != checkpoint_name(job.step):
        began = time.perf_counter()
        job.saved = job.save(run)
        job.saved_at = time.monotonic()
        seconds = round(time.perf_counter() - began, 3)
        run.log({"kind": "checkpoint", "step": job.step, "path": job.saved.name, "seconds": seconds})
    elif loss is not None and job.world.first:
        note_validation(job.saved, loss)
