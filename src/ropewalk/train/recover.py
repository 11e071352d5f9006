"""What is done about a loss spike: the run stops, drops the update, or goes back and leaves samples out."""

import math
import time
from typing import Any

from ropewalk.data import Batch
from ropewalk.errors import RopewalkError
from ropewalk.track import RunDirectory
from ropewalk.train.checkpoint import newest_valid_checkpoint
from ropewalk.train.goodput import note_rollback
from ropewalk.train.health import named_documents, stopped
from ropewalk.train.job import Job
from ropewalk.train.progress import Reporter


def on_spike(
    job: Job, loss: float, gradient_norm: float, score: float | None, parts: list[Batch], sound: bool
) -> dict[str, Any] | None:
    """A spike in the step that is being done, before its update: the record of the step, where it has none.

    `parts` are the micro-batches to blame; `score` is None where the loss or the norm is not finite. With
    several processes all decide alike: loss, score and `sound` (finite everywhere) are the same in each.
    Raises RopewalkError where the run must stop. None: record it, and update.
    """
    spike, spikes = job.recipe.train.spike, job.spikes
    if sound and spike.policy == "none":
        return None
    if score is None:
        what = f"the loss is {loss:.4g} and the gradient norm {gradient_norm:.4g}"
    else:
        above = f"{score:.1f} robust deviations above the median of {len(spikes.losses)} steps"
        what = f"the loss is {loss:.4g}, {above}"
    done = {"skip": len(spikes.skipped), "rollback": len(spikes.left_out)}.get(spike.policy)
    if done is None or done >= spike.limit:
        if done is not None:
            what += f", and train.spike.limit ({spike.limit}) is reached"
        updated = job.recipe.train.optimizer.in_backward and math.isfinite(loss)
        raise stopped(job.built.model, job.step, what, parts, updated)
    job.optimizer.discard()
    if spike.policy == "skip":
        spikes.skipped.append(job.step)
    return {
        "kind": spike.policy,
        "step": job.step,
        "loss": loss if math.isfinite(loss) else None,
        "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
        "spike": score,
        "batch": spikes.batch(job.step),
        "what": f"{what}; it came with {named_documents(parts)}",
        "time": round(time.time(), 3),
    }


def roll_back(job: Job, run: RunDirectory, reporter: Reporter, record: dict[str, Any]) -> None:
    """Goes back to the newest whole checkpoint; the samples of the step of `record` are left out from now on.

    All that came after the checkpoint is as if it had never been, but for a record that says so.
    """
    began, step = time.perf_counter(), job.step
    job.at(step, "checkpoint")
    left_out, trained = job.spikes.left_out, job.meter.train_seconds
    checkpoint = None
    if job.world.first:
        checkpoint, warnings = newest_valid_checkpoint(run.path)
        for warning in warnings:
            reporter.warn(warning)
    checkpoint = job.world.share(checkpoint)
    if checkpoint is None:
        raise RopewalkError(f"step {step}: {record['what']}; there is no checkpoint to go back to")
    numbers = {s: job.spikes.batch(s) for s in range(1, step + 1)[-job.recipe.train.spike.leave_out :]}
    job.restore(checkpoint)
    window = [number for s, number in numbers.items() if s > job.step]
    job.spikes.left_out = [*left_out, window]
    job.validation_losses = {s: loss for s, loss in job.validation_losses.items() if s <= job.step}
    run.truncate(job.step)
    seconds = round(time.perf_counter() - began, 3)
    run.log(record | {"step": job.step, "from": step, "left_out": job.spikes.left_out, "seconds": seconds})
    run.sync()
    note_rollback(run, trained - job.meter.train_seconds)
    limit = job.recipe.train.spike.limit
    reporter.say(
        f"step {step}: {record['what']}; back to step {job.step}, from now on without the samples of "
        f"{'this step' if len(window) == 1 else f'the last {len(window)} steps'} "
        f"(rollback {len(job.spikes.left_out)} of at most {limit})"
    )
