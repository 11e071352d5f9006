"""Training, top to bottom: pretraining from scratch, full fine-tuning and LoRA are the same loop.

What a step computes depends on the recipe, the data's fingerprint and the step's number only. All the rest
(optimizer, generators, position) is in the checkpoint, so that a resumed run repeats the uninterrupted one.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ropewalk.data import Batch, prefetch
from ropewalk.errors import RopewalkError
from ropewalk.parallel import divided, reduce_gradients
from ropewalk.track import RunDirectory
from ropewalk.train.checkpoint import checkpoint_name, note_validation
from ropewalk.train.flops import TokenCounts
from ropewalk.train.health import broken_parameter, named_documents, no_gradient
from ropewalk.train.job import Job
from ropewalk.train.objective import loss_sum, without_padding
from ropewalk.train.progress import Reporter
from ropewalk.train.recover import on_spike, roll_back
from ropewalk.train.saving import Saved, Saver
from ropewalk.train.signals import StopRequest
from ropewalk.train.stragglers import TIMES, sentence
from ropewalk.train.validate import validation_loss, write_samples
from ropewalk.train.verify import compare_replicas, compute_twice


def run_loop(job: Job, run: RunDirectory, reporter: Reporter, stop: StopRequest) -> list[float]:
    """Trains from `job.step` to `job.steps`, or until `stop`: the losses of the steps done here.

    What is due at a step (validation, samples, checkpoint) is done at the top of the loop, before the next
    step: so a run that stopped in between makes up for it when it goes on.
    """
    losses: dict[int, float] = {}
    with Saver(run.checkpoints_path, job.recipe.train.keep, job.world, run.sync) as saver:
        job.before_update = saver.settle
        while True:
            with closing(ahead(job)) as batches:
                spike = run_until_spike(job, run, reporter, stop, saver, batches, losses)
            if spike is None:
                break
            log_saved(run, saver.finish())
            roll_back(job, run, reporter, spike)
            losses = {step: loss for step, loss in losses.items() if step <= job.step}
        if stop:
            checkpoint(job, run, saver, goes_on=False)
    return list(losses.values())


def run_until_spike(
    job: Job,
    run: RunDirectory,
    reporter: Reporter,
    stop: StopRequest,
    saver: Saver,
    batches: Iterator[Batch],
    losses: dict[int, float],
) -> dict[str, Any] | None:
    """The loop, which adds to `losses` by step; the record of a step that makes the run go back, or None."""
    train = job.recipe.train
    while True:
        log_saved(run, saver.poll())
        by_clock = stop.agree(job.save_is_due(saver))
        if stop:
            return None
        if job.step == 0 or job.due(train.evaluate_every):
            evaluate(job, run, reporter, stop)
        if job.due(train.sample_every) and not stop:
            sample(job, run)
        if job.step > 0 and (by_clock or job.due(train.checkpoint_every)) and not stop:
            checkpoint(job, run, saver, goes_on=job.step < job.steps)
        if train.spike.policy == "rollback" and job.saved is None and not stop:
            checkpoint(job, run, saver, goes_on=True)  # there is always one to go back to
        if job.step == job.steps or stop:
            return None
        job.step += 1
        record = train_step(job, batches)
        if record["kind"] == "rollback":
            return record
        if record["kind"] == "skip":
            run.log(record)
            done = f"update skipped ({len(job.spikes.skipped)} of at most {train.spike.limit})"
            reporter.say(f"step {job.step}/{job.steps}  {record['what']}; {done}")
            continue
        losses[job.step] = record["loss"]
        logged = job.step == 1 or job.due(train.log_every) or "spike" in record
        if logged:
            run.log(record)
        reporter.step(record, line=logged)
        for late in job.paces.look(job.step):
            run.log(late)
            if late["looks"] == TIMES:
                reporter.say(f"step {job.step}/{job.steps}  {sentence(late)}")
        if "spike" in record:
            reporter.say(f"step {job.step}/{job.steps}  a spike: {record['spike']:.1f} robust deviations up")


def ahead(job: Job) -> Generator[Batch]:
    """This process's rows of the steps that are still to do."""
    steps, own = range(job.step + 1, job.steps + 1), job.world.part * job.own_rows
    firsts = (job.spikes.batch(step) * job.rows + own for step in steps)
    return prefetch(job.loader, firsts, job.own_rows, pin=job.device.type == "cuda")


def train_step(job: Job, batches: Iterator[Batch]) -> dict[str, Any]:
    """One optimizer step: its record. Nothing is updated where the loss or a gradient is not finite.

    A record of kind `skip` or `rollback` is of a step that was not updated: see train.spike.policy.
    """
    train, model, optimizer = job.recipe.train, job.built.model, job.optimizer
    began = time.perf_counter()
    job.paces.begin()
    job.at(job.step, "waiting for data")
    batch = next(batches)
    waited = time.perf_counter() - began
    job.at(job.step, "forward and backward")
    counts = TokenCounts.of(batch, model.config)
    parts = job.micro_batches(batch)
    if not train.compile and job.pipeline is None:  # both want one shape
        parts = [without_padding(part, math.lcm(64, job.world.layout.whole)) for part in parts]
    met = time.perf_counter()
    counts = counts.total(job.world)
    waiting = time.perf_counter() - met
    if not counts.scored:
        raise RopewalkError(f"step {job.step}: nothing is scored in {named_documents(parts)}; see data.score")

    rate = job.learning_rate()
    optimizer.begin(rate)
    if train.optimizer.in_backward:
        job.before_update()
    if train.verify_every and job.step % train.verify_every == 0:
        *part_sums, gradient_norm = verified(job, parts, counts.scored)
    else:
        *part_sums, gradient_norm = compute(job, parts, counts.scored)
    # totals, so that all processes decide alike
    met = time.perf_counter()
    loss, broken = job.world.total_of_tokens([math.fsum(part_sums), not math.isfinite(gradient_norm)])
    waiting += time.perf_counter() - met
    computed = time.perf_counter()
    loss /= counts.scored
    sound = math.isfinite(loss) and not broken
    score = job.spikes.score(loss) if sound else None
    spike = score is not None and score > train.spike.threshold
    if spike or not sound:
        guilty = [part for part, value in zip(parts, part_sums, strict=True) if not math.isfinite(value)]
        record = on_spike(job, loss, gradient_norm, score, guilty or parts, sound)
        if record is not None:
            return record | {"seconds": round(time.perf_counter() - began, 6)}
    if job.step == 1 and gradient_norm == 0.0:
        raise no_gradient(model)

    job.at(job.step, "update")
    job.before_update()
    if train.clip and gradient_norm > train.clip:
        optimizer.scale_gradients(train.clip / gradient_norm)
    optimizer.step(rate)
    job.spikes.keep(loss)
    values = {"loss": loss, "gradient_norm": gradient_norm, "learning_rate": rate}
    if spike and score is not None:
        values["spike"] = score
    ended = time.perf_counter()
    values |= {"compute_seconds": computed - began - waited, "update_seconds": ended - computed}
    seconds = ended - began
    job.paces.add(seconds, waited, waiting)
    return job.meter.record(job.step, counts, seconds, waited, values)


def compute(job: Job, parts: list[Batch], scored: int) -> list[float]:
    """Gradients of a step: the summed loss of each micro-batch, and the norm of all gradients."""
    if job.recipe.train.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # the gradients that the last replays made are used up
    if job.pipeline is not None:
        sums = job.pipeline.compute(parts, scored)
    else:
        sums = []
        for part in parts:
            reduce_gradients(job.built.model, job.world, last=part is parts[-1])
            sums.append(backward(job, part, scored))
    measured = torch.stack([*sums, job.optimizer.gradient_norm().to(job.device)])
    return measured.tolist()  # the step's one wait for the device


def verified(job: Job, parts: list[Batch], scored: int) -> list[float]:
    """The same, computed twice, by replicas whose weights and states are the same. RopewalkError if not."""
    optimizer = job.optimizer
    divided(job.built.model, job.world)
    weights = {f"weight.{name}": parameter for name, parameter in optimizer.parameters.items()}
    compare_replicas({**weights, **optimizer.state_tensors()}, job.world, job.step)
    return compute_twice(
        lambda: compute(job, parts, scored), optimizer.gradients, optimizer.discard, job.world, job.step
    )


def backward(job: Job, part: Batch, scored: int) -> Tensor:
    """Adds a micro-batch's gradients; its loss summed over scored tokens.

    Divided by the scored tokens of the whole step, so that accumulated steps equal one large batch exactly.
    """
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


def checkpoint(job: Job, run: RunDirectory, saver: Saver, goes_on: bool) -> None:
    """A checkpoint of this step; one that is there already only learns its validation loss.

    Where training goes on, it is written meanwhile; else it is whole on return.
    """
    job.at(job.step, "checkpoint")
    log_saved(run, saver.finish())
    loss = job.validation_losses.get(job.step)
    if job.saved is None or job.saved.name != checkpoint_name(job.step):
        job.save(saver, copy=goes_on)
        if not goes_on:
            log_saved(run, saver.finish())
            job.world.wait()
    elif loss is not None and job.world.first:
        note_validation(job.saved, loss)


def log_saved(run: RunDirectory, saved: Saved | None) -> None:
    """A record of a checkpoint once it is whole."""
    if saved is not None:
        times = {"seconds": round(saved.waited, 3), "write_seconds": round(saved.seconds, 3)}
        run.log({"kind": "checkpoint", "step": saved.step, "path": saved.path.name, **times})
