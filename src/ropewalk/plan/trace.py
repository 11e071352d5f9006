"""What the training step itself takes, seen tensor by tensor: the measure of `step_memory`.

The real code runs (model, adapters, savers of activations, loss, optimizer, the loop's own forward and
backward), and each storage is noted when it comes and when it goes. With fake tensors, which have shapes and
no numbers, nothing is allocated or computed, so that models of any size can be traced on a laptop.

What no tensor in Python ever shows is not seen: what a kernel allocates inside one operation.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ropewalk.adapt import AdapterConfig, apply_adapter, freeze, quantize_base
from ropewalk.data import Batch
from ropewalk.errors import UserError
from ropewalk.model import Transformer, from_config
from ropewalk.ops import QUANTIZED, Linear, QuantizedTensor
from ropewalk.parallel import World, local
from ropewalk.plan.work import Work
from ropewalk.train.activations import save_activations
from ropewalk.train.build import DTYPES
from ropewalk.train.job import Job
from ropewalk.train.loop import compute
from ropewalk.train.optim import Optimizer, OptimizerConfig

PHASES = ("forward", "loss", "backward", "update")


@dataclass
class Seen:
    """A storage: how large, which events it lived between, and what for."""

    size: int
    born: int
    phase: str
    died: int | None = None
    role: str = ""


@dataclass(frozen=True)
class Traced:
    """The most that was alive at once in one step."""

    total_bytes: int
    moment: str
    """the phase in which that was, of `PHASES`"""
    terms: dict[str, int]
    """bytes at that moment, by the names of `step_memory` where it has them; `temporary`: the rest"""
    peaks: dict[str, int]
    """the most in each phase"""


class Tracker(TorchDispatchMode):
    """Notes each storage that an operation takes or makes. `fake`: what computes on nothing, where it does.

    Real and fake tensors may be mixed: whole numbers (labels, segments, counts) stay real, so that what
    depends on them can be decided; floating tensors are made fake from the first.
    """

    def __init__(self, fake: Any = None) -> None:
        super().__init__()
        self.fake, self.phase, self.event = fake, "forward", 0
        self.seen: list[Seen] = []
        self.marks: list[tuple[int, str]] = []
        self._known: dict[int, tuple[Any, Seen]] = {}
        """by the address of the storage's object: (weak reference, what is known of it)"""

    def mark(self, phase: str) -> None:
        """From here on it is another phase of the step."""
        self.event += 1
        self.phase = phase
        self.marks.append((self.event, phase))

    def tag(self, tensor: Tensor, role: str) -> None:
        """Says what a tensor is for; one that was not seen yet was there from the beginning."""
        for seen in self._note(tensor, fresh=False):
            seen.role = role

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.event += 1
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in taken:
            self._note(tensor, fresh=False)
        out = func(*args, **kwargs) if self.fake is None else self._pretend(func, args, kwargs, taken)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, fresh=True)
        return out

    def _pretend(self, func: Any, args: Any, kwargs: Any, taken: list[Tensor]) -> Any:
        """The operation on fake tensors; numbers that the code asks for are made up."""
        from torch._subclasses import FakeTensor

        fake = any(isinstance(tensor, FakeTensor) for tensor in taken)
        if func is torch.ops.aten._local_scalar_dense.default and fake:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.bincount.default and fake:  # tokens of each expert: an even load
            total, count = args[0].numel(), kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return torch.tensor([total * (i + 1) // count - total * i // count for i in range(count)])
        if func is torch.ops.aten.index.Tensor and fake:  # a real mask says how many there are
            masks = [i if i is None or i.dtype != torch.bool else i.nonzero()[:, 0] for i in args[1]]
            args = (args[0], masks)
        if not taken and kwargs.get("dtype", torch.get_default_dtype()).is_floating_point:
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, fresh: bool) -> list[Seen]:
        if isinstance(tensor, QuantizedTensor):
            return [seen for part in tensor.parts().values() for seen in self._note(part, fresh)]
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return [known[1]]
        seen = Seen(storage.nbytes(), self.event if fresh else 0, self.phase)

        def gone(_: Any) -> None:
            seen.died = self.event
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone), seen
        self.seen.append(seen)
        return [seen]

    def result(self) -> Traced:
        """The peak of what was seen, and what was alive then."""
        end = self.event + 1
        changes: list[tuple[int, int]] = []
        for seen in self.seen:
            changes.append((seen.born, seen.size))
            changes.append((end if seen.died is None else seen.died + 1, -seen.size))
        changes.sort()
        peaks, best, at, alive = dict.fromkeys(PHASES, 0), 0, 0, 0
        for place, (event, size) in enumerate(changes):
            alive += size
            if place + 1 < len(changes) and changes[place + 1][0] == event:
                continue
            phase = self._phase_at(event)
            peaks[phase] = max(peaks[phase], alive)
            if alive > best:
                best, at = alive, event
        terms: dict[str, int] = {}
        for seen in self.seen:
            if seen.born <= at and (seen.died is None or seen.died >= at):
                role = seen.role or self._role(seen)
                terms[role] = terms.get(role, 0) + seen.size
        return Traced(best, self._phase_at(at), terms, peaks)

    def _phase_at(self, event: int) -> str:
        return next((phase for first, phase in reversed(self.marks) if first <= event), PHASES[0])

    def _role(self, seen: Seen) -> str:
        """Of a tensor that nobody has named: by when it came, and whether it outlived its phase."""
        if seen.born == 0:
            return "buffers"
        end = self.event if seen.died is None else seen.died
        if not any(seen.born < event <= end for event, _ in self.marks):
            return "temporary"
        return {"forward": "activations", "loss": "loss gradients"}.get(seen.phase, "gradients")


def trace_step(work: Work, fake: bool = True) -> Traced:
    """The second optimizer step of this work in one process (a first one makes the states), on a CPU, traced.

    `fake`: on tensors without numbers; else it is computed. UserError for what cannot be traced.
    """
    if work.layout.processes != 1:
        raise UserError("plan --trace: only the step of a single process can be traced; set parallel to 1")
    if work.compile or work.precision == "float8":
        raise UserError("plan --trace: a compiled step cannot be traced; set train.compile: false")
    if fake and work.checkpointing_budget is not None:
        raise UserError(
            "plan --trace: a budget is found by a measurement; say which checkpointing it comes to"
        )
    mode = _fake_mode() if fake else None
    with mode or nullcontext():
        job = _job(work, model_of(work))
    parts = _micro_batches(work)
    with Tracker(mode) as tracker:
        _step(job, parts, tracker)
    with Tracker(mode) as tracker, watching(job, parts, tracker):
        _step(job, parts, tracker)
    return tracker.result()


@contextmanager
def watching(job: Job, parts: Sequence[Batch], tracker: Tracker) -> Iterator[None]:
    """Tells the tracker what is there before a step, and where forward ends and backward begins."""
    model = job.built.model
    for parameter in model.parameters():
        value = local(parameter)
        if isinstance(value, QuantizedTensor):
            for name, part in value.parts().items():
                tracker.tag(part, "quantized codes" if name == "codes" else "quantized constants")
        else:
            tracker.tag(value, "weights trained" if parameter.requires_grad else "weights frozen")
    for slot in job.optimizer._slots.values():
        for kind, tensor in slot.tensors().items():
            if kind not in ("master", "step"):
                tracker.tag(tensor, "optimizer states")
        if slot.weight is not slot.parameter:
            tracker.tag(slot.weight, "masters")
    for batch in parts:
        for tensor in (batch.tokens, batch.labels, batch.positions, batch.segments):
            tracker.tag(tensor, "inputs")

    def end(_: nn.Module, __: Any, hidden: Tensor) -> None:
        tracker.mark("loss")
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.mark("backward"))

    handles = [
        model.register_forward_pre_hook(lambda *_: tracker.mark("forward")),
        model.register_forward_hook(end),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def note_update(job: Job, tracker: Tracker) -> None:
    """Tells the tracker that gradients are complete, and the update begins."""
    tracker.mark("update")
    for gradient in job.optimizer.gradients().values():
        tracker.tag(gradient, "gradients")


def _fake_mode() -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def model_of(work: Work, device: torch.device | str = "cpu") -> Transformer:
    """The model of a run as `train.build` makes it, with random weights (fake ones in a fake mode)."""
    dtype = DTYPES[work.precision]
    pretends = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    if not pretends:
        model = from_config(work.config, seed=0, device=device).to(dtype=dtype)
    else:  # fake parameters can be replaced, not converted
        model = Transformer(work.config)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().to(dtype))
        model.tie_head()
    if work.quantize != "none" and pretends:
        _quantized_fakes(model, work.quantize)
    elif work.quantize != "none":
        quantize_base(model.requires_grad_(False), kind=work.quantize)
    if work.method != "full":
        options = work.method, work.rank, 2.0 * work.rank, work.dropout, work.targets, False, work.tokens
        apply_adapter(model, AdapterConfig(*options))
    elif work.freeze:
        freeze(model, work.freeze)
    model.train()
    save_activations(
        model,
        work.checkpointing,
        every=work.checkpointing_every,
        budget=work.checkpointing_budget,
        offload=work.activation_offload,
        randomness=work.dropout > 0,
    )
    return model


def _quantized_fakes(model: Transformer, kind: str) -> None:
    """What `quantize_base` leaves, without the numbers that it decides by."""
    for module in model.requires_grad_(False).blocks.modules():
        if isinstance(module, Linear):
            whole = QUANTIZED[kind].unfilled(module.weight.shape, module.weight.dtype)
            module.weight = nn.Parameter(whole, requires_grad=False)


def _job(work: Work, model: Transformer, world: World | None = None) -> Job:
    """What the loop's `compute` reads of a Job."""
    config = OptimizerConfig(
        name=work.optimizer,
        state_bits=work.state_bits,
        masters=work.masters,
        offload=work.offload,
        in_backward=work.in_backward,
    )
    train = SimpleNamespace(
        cuda_graphs=False,
        compile=work.compile,
        loss_chunk=work.loss_chunk,
        optimizer=SimpleNamespace(in_backward=work.in_backward),
    )
    job = SimpleNamespace(
        recipe=SimpleNamespace(train=train),
        built=SimpleNamespace(model=model),
        optimizer=Optimizer(model, config, world=world),
        device=torch.device("cpu"),
        world=world or World(),
        pipeline=None,
        rows=work.batch_size,
    )
    return cast(Job, job)


def _micro_batches(work: Work) -> list[Batch]:
    """Rows of documents of that mean length, of which the wanted share of the tokens is scored."""
    rows, length = work.micro_batch_size * work.accumulation, work.sequence_length
    mean = min(work.document_length or length, length)
    lengths = [mean + mean // 4, mean - mean // 4] if mean < length else [length]  # no two neighbours equal
    cut = torch.tensor(lengths * (length // mean + 1)).cumsum(0)
    document = torch.bucketize(torch.arange(length), cut, right=True)
    place = torch.arange(length) - torch.cat((torch.zeros(1, dtype=torch.long), cut))[document]
    labels = torch.randint(work.config.vocab_size, (rows, length))
    unscored = torch.rand(rows, length) >= work.scored
    batch = Batch(
        torch.randint(work.config.vocab_size, (rows, length)),
        labels.masked_fill_(unscored, -100) if work.scored < 1 else labels,
        place.repeat(rows, 1),
        document.repeat(rows, 1),
    )
    size = work.micro_batch_size
    return [batch.rows(row, row + size) for row in range(0, rows, size)]


def _step(job: Job, parts: list[Batch], tracker: Tracker) -> None:
    """An optimizer step, as the loop makes it."""
    rate = 1e-4
    job.optimizer.begin(rate)
    compute(job, parts, sum(int((part.labels >= 0).sum()) for part in parts))
    note_update(job, tracker)
    job.optimizer.step(rate)
