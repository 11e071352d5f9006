"""Pairs of settings that cannot go together, each with the reason and the way out."""

from collections.abc import Iterator
from dataclasses import replace

from ropewalk.errors import UserError
from ropewalk.layout import ONE_STAGE, ZERO_BUBBLE, Layout
from ropewalk.recipe.schema import Recipe


def refuse_conflicts(recipe: Recipe) -> None:
    """Raises UserError with every pair of a resolved recipe that cannot work or would have no effect."""
    parts = (_of_data, _of_adapters, _of_layout, _of_optimizer, _of_activations)
    found = [conflict for part in parts for conflict in part(recipe)]
    if found:
        raise UserError("; ".join(f"{key}: {why}" for key, why in found))


def _of_data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.data.packing == "concat" and recipe.data.too_long != "auto":
        why = "with packing concat a document may be longer than a row and is cut at the rows' ends"
        yield "data.too_long", f"{why}; leave it out, or set data.packing: best_fit"


def _of_adapters(recipe: Recipe) -> Iterator[tuple[str, str]]:
    adapt, method = recipe.adapt, recipe.adapt.method
    low_rank = method in ("lora", "dora")
    if method != "full" and recipe.model.source is None:
        yield "adapt.method", f"{method} adapts a pretrained model; give model.source, or set it to full"
    if adapt.quantize != "none" and method in ("full", "bitfit"):
        why = f"quantized weights cannot be trained or saved in place, as method {method} would"
        yield "adapt.quantize", f"{why}; set adapt.method: lora"
    if adapt.freeze and method != "full":
        yield "adapt.freeze", f"method {method} freezes the whole model already; leave it out"
    if adapt.dropout and not low_rank and method != "bottleneck":
        yield "adapt.dropout", f"method {method} has nowhere to drop; set it to 0"
    if not low_rank and adapt.b_rate != 1.0:
        yield "adapt.b_rate", f"method {method} has no matrix B; set adapt.method: lora"
    if not low_rank and adapt.rank_stabilized:
        yield "adapt.rank_stabilized", f"method {method} has no scale; set adapt.method: lora"


def _of_optimizer(recipe: Recipe) -> Iterator[tuple[str, str]]:
    train, optimizer = recipe.train, recipe.train.optimizer
    if optimizer.in_backward:
        key = "train.optimizer.in_backward"
        if train.clip:
            yield key, "clipping needs the norm of all gradients before the first update; set train.clip: 0"
        assert train.batch_size is not None  # resolved
        rows = train.batch_size // (recipe.parallel.replicate * recipe.parallel.shard)
        if train.micro_batch_size != rows:
            why = "a gradient is complete only after the last micro-batch"
            yield key, f"{why}; set train.micro_batch_size: {rows}"
        if optimizer.offload:
            yield key, "offload collects gradients on the host and updates later; choose one of the two"
        if train.spike.policy == "skip":
            why = "when a loss is known to be one, in_backward has updated the weights with it"
            yield "train.spike.policy", f"skip drops the update of a spike, and {why}; set it to rollback"
        if train.verify_every:
            why = "the weights are updated in the first backward pass, so that a second one finds others"
            yield "train.verify_every", f"{why}; set train.optimizer.in_backward: false, or leave it out"
    if optimizer.state_bits < 32 and optimizer.name not in ("adamw", "lion"):
        why = {
            "muon": "its momentum is made orthogonal, which would make the rounding of small parts large",
            "adafactor": "its state is one row and one column per matrix and small already",
        }[optimizer.name]
        yield "train.optimizer.state_bits", f"not with {optimizer.name}: {why}; set it to 32"
    if not optimizer.masters and train.precision == "float32":
        yield (
            "train.optimizer.masters",
            "float32 weights are their own masters; set train.precision: bfloat16",
        )


def _of_layout(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What needs whole matrices, or has not been taught to do with parts of them."""
    parallel, optimizer, method = recipe.parallel, recipe.train.optimizer, recipe.adapt.method
    divided = "parallel.shard" if parallel.context == 1 else "parallel.context"
    if parallel.shard * parallel.context > 1 and optimizer.name in ("muon", "adafactor"):
        why = f"{optimizer.name} looks at whole matrices, and each process has a part; use adamw or lion"
        yield "train.optimizer.name", f"{why}, or set parallel.replicate instead of {divided}"
    if parallel.shard * parallel.context > 1 and optimizer.state_bits < 32:
        why = "blocks of low-bit states lie across the borders of the parts"
        yield "train.optimizer.state_bits", f"not with {divided}: {why}; set it to 32"
    if parallel.pipeline > 1:
        yield from _of_pipeline(recipe)
    if parallel.tensor > 1:
        yield from _of_tensor(recipe)
    if parallel.context > 1:
        yield from _of_context(recipe)
    if parallel.expert > 1:
        yield from _of_expert(recipe)
    several = parallel.replicate * parallel.shard * parallel.context * parallel.pipeline > 1
    if several and method in ("prompt", "prefix"):
        why = "virtual tokens run through the blocks beside the documents"
        others = [
            f" and parallel.{name}: 1" for name in ("context", "pipeline") if getattr(parallel, name) > 1
        ]
        end = "".join(others)
        yield "adapt.method", f"{method} trains in one process only: {why}; set parallel.shard: 1{end}"


def _of_pipeline(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What the schedule cannot do, and what needs one micro-batch to end before the next begins."""
    train, parallel = recipe.train, recipe.parallel
    schedule, stages = parallel.pipeline_schedule, parallel.pipeline_stages
    if schedule in ONE_STAGE and stages not in (None, 1):
        way = "set it to 1, or parallel.pipeline_schedule: interleaved-1f1b"
        yield "parallel.pipeline_stages", f"with {schedule} a process has one run of blocks; {way}"
    if schedule == "zbv" and stages not in (None, 2):
        way = "set it to 2, or parallel.pipeline_schedule: interleaved-zb"
        yield "parallel.pipeline_stages", f"zbv goes through the processes there and back; {way}"
    if train.optimizer.in_backward:
        why = "it has one micro-batch in a step, and a pipeline is idle without several"
        yield "train.optimizer.in_backward", f"{why}; set it to false, or parallel.pipeline: 1"
    else:
        yield from _of_micro_batches(recipe)
    if train.cuda_graphs:
        why = (
            "a replay overwrites what the one before has kept, and a pipeline has several micro-batches open"
        )
        yield "train.cuda_graphs", f"{why}; set it to false"
    if train.activation_offload:
        why = "inputs come back in the reverse order of a single micro-batch, and a pipeline has several open"
        yield "train.activation_offload", f"{why}; set it to false"
    if schedule in ZERO_BUBBLE:
        if train.compile:
            why = f"{schedule} makes gradients of weights apart, which compiled blocks make in one go"
            yield "train.compile", f"{why}; set it to false, or parallel.pipeline_schedule: 1f1b"
        if train.checkpointing == "selective" or train.checkpointing_budget is not None:
            key = "checkpointing" if train.checkpointing_budget is None else "checkpointing_budget"
            why = f"{schedule} goes back through a block twice, and selective checkpointing allows that once"
            yield f"train.{key}", f"{why}; set train.checkpointing: full, or parallel.pipeline_schedule: 1f1b"
        if parallel.shard * parallel.context > 1 and parallel.stage != 1:
            why = f"{schedule} makes gradients of weights late, and keeps them whole until then"
            yield "parallel.stage", f"{why}; set it to 1, or parallel.pipeline_schedule: 1f1b"


def _of_micro_batches(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """A number of micro-batches in a step that the schedule cannot do."""
    train, parallel = recipe.train, recipe.parallel
    layout = Layout(pipeline=parallel.pipeline, shard=1, pipeline_schedule=parallel.pipeline_schedule)
    rows = (train.batch_size or 1) // (parallel.replicate * parallel.shard)
    size = train.micro_batch_size or rows
    if layout.takes(rows // size):
        return
    fits = [n for n in range(1, rows + 1) if rows % n == 0 and layout.takes(rows // n)]
    fewer = range(min(parallel.pipeline - 1, rows // size), 1, -1)
    degree = next((d for d in fewer if replace(layout, pipeline=d).takes(rows // size)), 1)
    way = f"set parallel.pipeline: {degree}"
    if fits:
        way = f"set it to {min(fits, key=lambda n: (abs(n - size), n))}, or {way.removeprefix('set ')}"
    needs = (
        "at least as many as processes" if layout.pipeline_schedule == "1f1b" else "rounds of equal length"
    )
    why = f"{rows} rows make {rows // size} micro-batches of {size} for {parallel.pipeline} processes, and "
    yield "train.micro_batch_size", f"{why}{parallel.pipeline_schedule} needs {needs}; {way}"


def _of_context(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Rows of a length that cannot be shared out evenly: see `Layout.whole`."""
    size, degree, tensor = recipe.data.sequence_length, recipe.parallel.context, recipe.parallel.tensor
    pieces = 2 * degree * tensor
    if size % pieces:
        fewer = range(min(degree - 1, size // (2 * tensor)), 1, -1)
        fits = next((d for d in fewer if size % (2 * d * tensor) == 0), 1)
        nearest = max(1, round(size / pieces)) * pieces
        each = "two for each process" if tensor == 1 else f"two for each of {degree} x {tensor} processes"
        why = f"rows of {size} tokens cannot be cut into {pieces} equal pieces, {each}"
        yield "parallel.context", f"{why}; set it to {fits}, or data.sequence_length: {nearest}"


def _of_tensor(recipe: Recipe) -> Iterator[tuple[str, str]]:
    train, method, degree = recipe.train, recipe.adapt.method, recipe.parallel.tensor
    if train.optimizer.name in ("muon", "adafactor"):
        why = (
            f"{train.optimizer.name} looks at whole matrices, and each process has slices; use adamw or lion"
        )
        yield "train.optimizer.name", f"{why}, or set parallel.tensor: 1"
    if train.optimizer.state_bits < 32:
        yield "train.optimizer.state_bits", "not with parallel.tensor: blocks lie across slices; set it to 32"
    if method not in ("full", "lora", "bitfit"):
        yield "adapt.method", f"{method} has not been taught slices of matrices; set parallel.tensor: 1"
    if train.precision == "float8":
        yield (
            "train.precision",
            "float8 scales whole tensors, and each process has slices; set parallel.tensor: 1",
        )
    if train.compile:
        yield "train.compile", "not with parallel.tensor: blocks exchange hidden states; set it to false"
    if recipe.data.sequence_length % degree:
        why = f"between products each of {degree} processes has a part of the tokens"
        yield "data.sequence_length", f"{why}; make it a multiple of {degree}"


def _of_expert(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.train.compile:
        yield "train.compile", "not with parallel.expert: blocks exchange hidden states; set it to false"
    if recipe.train.precision == "float8":
        why = "float8 products take a multiple of 16 tokens, and an expert gets as many as come"
        yield "train.precision", f"{why}; set parallel.expert: 1"


def _of_activations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    train = recipe.train
    recomputed = train.checkpointing != "none" or train.checkpointing_budget is not None
    if train.checkpointing_budget is not None and (
        train.checkpointing != "none" or train.checkpointing_every != 1
    ):
        why = "it chooses the mode of each block itself"
        yield "train.checkpointing_budget", f"{why}; leave out train.checkpointing and checkpointing_every"
    elif train.checkpointing_every != 1 and not recomputed:
        yield "train.checkpointing_every", "no block is recomputed; set train.checkpointing: full"
    if train.activation_offload and train.checkpointing != "full":
        why = "it moves the inputs of blocks that are recomputed whole"
        yield "train.activation_offload", f"{why}; set train.checkpointing: full"
    some = train.checkpointing == "selective" and train.checkpointing_every > 1
    if train.compile and (some or train.checkpointing_budget is not None):
        why = "compiled blocks are one graph, which keeps the same in each of them"
        yield "train.compile", f"{why}; use train.checkpointing: none, selective or full for all"
    if train.cuda_graphs and not (train.compile and train.device == "cuda"):
        yield (
            "train.cuda_graphs",
            "graphs are made of compiled blocks on a GPU; set train.compile: true there",
        )
    if train.precision == "float8" and train.device != "cuda":
        yield "train.precision", "float8 needs a GPU that has it (compute capability 8.9 or newer)"
    rows, size = train.micro_batch_size or train.batch_size or 1, recipe.data.sequence_length
    size //= recipe.parallel.context
    if train.precision == "float8" and rows * size % 16:
        why = f"float8 products take a multiple of 16 tokens, and a micro-batch has {rows} x {size}"
        yield "data.sequence_length", f"{why}; make it a multiple of 16"
