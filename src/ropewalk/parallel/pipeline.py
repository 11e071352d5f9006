"""Pipeline parallelism: a step's micro-batches go through stages in several processes, in torch's schedules.

Every process of a `pipeline` group reads the same rows, so hidden states are all that goes from one stage to
the next (and, of mixtures of experts, the routers' statistics). torch.distributed.pipelining says who does
what when; what a stage computes and where its gradients go is said here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ropewalk.layout import ONE_STAGE
from ropewalk.model import Transformer
from ropewalk.parallel.sharding import is_sharded, reduce_gradients
from ropewalk.parallel.world import World

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
Objective = Callable[[Tensor, Tensor, Tensor | None, Any], Tensor]
"""(hidden states `[B, S, H]`, labels `[B, S]`, statistics of the routers `[2, experts]` or None, real tokens)
-> what is minimized, a micro-batch's part of it: 0-d."""


class Pipeline:
    """The stages of this process, after `shard`, and their schedule.

    `shape`: rows and tokens `[B, S]` of a micro-batch, of whole rows; `receive(name)` is told of a gradient
    that no hook of its parameter has seen.
    """

    def __init__(
        self,
        model: Transformer,
        world: World,
        stages: Sequence[range],
        micro_batches: int,
        shape: tuple[int, int],
        objective: Objective,
        receive: Callable[[str], None],
    ) -> None:
        self.model, self.world, self.objective = model, world, objective
        self.layout, self.stages, self.micro_batches = world.layout, stages, micro_batches
        self.parts: list[tuple[Tensor, ...]] = []
        """tokens, positions, segments and labels of each micro-batch of the step"""
        self.micro_batch = 0
        """the one whose forward pass is done now: torch's schedules hand on hidden states only"""
        self.split = self.layout.split_backward
        self.receive = receive
        index = world.index("pipeline")
        mine = [stage for stage in range(len(stages)) if self.layout.place(stage) == index]
        self.first, self.last = 0 in mine, len(stages) - 1 in mine
        runners = [self._runner(stage, shape) for stage in mine]
        kind = SCHEDULES[self.layout.pipeline_schedule]
        given = runners[0] if self.layout.pipeline_schedule in ONE_STAGE else runners
        self._stages, self._ended = len(runners), 0
        # losses are sums already, divided by the scored tokens of the whole step
        self.schedule = kind(given, micro_batches, loss_fn=_given, scale_grads=False)

    def step(self, tokens: Tensor, positions: Tensor, segments: Tensor, labels: Tensor) -> None:
        """Forward and backward passes of a step's rows `[micro_batches * B, S]`; gradients are where they
        always are. Segments and labels best on the host."""
        if self.model.row_part is not None:  # other processes have the other tokens
            here = self.model.row_part.columns(tokens.shape[1])
            tokens, positions, labels = tokens[:, here], positions[:, here], labels[:, here]
        self._ended, rows = 0, len(tokens) // self.micro_batches
        whole = (tokens, positions, segments, labels)
        self.parts = list(zip(*(x.split(rows) for x in whole), strict=True))
        if self.split and is_sharded(self.model):
            self._hold(True)
        self.schedule.step(
            *([tokens] if self.first else []),
            target=torch.zeros(len(tokens)) if self.last else None,
            return_outputs=False,
        )
        self.parts = []

    def before_backward(self, last: bool) -> None:
        """`last`: of a step, in a stage."""
        if not self.split:
            reduce_gradients(self.model, self.world, last)

    def after_weights(self) -> None:
        """torch leaves gradients of weights that are made apart in `.grad`, and calls no hook."""
        if not is_sharded(self.model):
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    self.receive(name)

    def after_stage(self, runner: "_Runner") -> None:
        """When all of a stage is done. What was held back is divided when all stages are."""
        self._ended += 1
        if self.split and is_sharded(self.model) and self._ended == self._stages:
            self._hold(False)
            runner.reduce(self.model)

    def _hold(self, hold: bool) -> None:
        """Whether weights and gradients stay whole after a backward pass."""
        self.model.set_is_last_backward(not hold)  # type: ignore[operator]
        self.model.set_reshard_after_backward(not hold)  # type: ignore[operator]
        self.model.set_requires_gradient_sync(not hold)  # type: ignore[operator]

    def _runner(self, stage: int, shape: tuple[int, int]) -> "_Runner":
        rows, length = shape
        length //= self.layout.context
        config, like = self.model.config, self.model.embed.weight
        count = len(self.stages)
        between = [torch.empty(rows, length // self.layout.tensor, config.hidden_size, dtype=like.dtype)]
        if config.moe_layers:
            between.append(torch.empty(2, config.num_experts))
        hidden = tuple(t.to("meta").requires_grad_() for t in between)
        wide = torch.promote_types(like.dtype, torch.float32)
        return _Runner(
            self,
            Stage(self, self.stages[stage]),
            stage,
            count,
            like.device,
            input_args=hidden if stage else torch.empty(rows, length, dtype=torch.long, device="meta"),
            output_args=hidden
            if stage < count - 1
            else torch.empty(1, dtype=wide, device="meta").requires_grad_(),
            group=self.world.group("pipeline"),
        )


class _Runner(PipelineStage):
    """torch's stage, which tells the pipeline what it is about to do, and has done."""

    def __init__(self, pipeline: Pipeline, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pipeline = pipeline

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        self.pipeline.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        self.pipeline.before_backward(bool(options.get("last_backward")))
        return super().backward_one_chunk(bwd_chunk_id, *arguments, **options)

    def backward_weight_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        done = super().backward_weight_one_chunk(*arguments, **options)
        self.pipeline.after_weights()
        return done

    def perform_reduce_grad(self, *_: Any) -> None:
        self.pipeline.after_stage(self)

    def reduce(self, model: nn.Module) -> None:
        """torch's own way to divide gradients that were held back, of all of the model."""
        stage, self.submod = self.submod, model
        super().perform_reduce_grad(1)
        self.submod = stage


class Stage(nn.Module):
    """A run of blocks as torch's pipelines call it."""

    def __init__(self, pipeline: Pipeline, span: range) -> None:
        super().__init__()
        self._pipeline = [pipeline]  # in a list: its model is no part of this module
        self.span = span
        self.first, self.last = span.start == 0, span.stop == pipeline.model.config.num_hidden_layers

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those that this stage uses."""
        model = self._pipeline[0].model
        modules = [model.blocks.get_submodule(str(i)) for i in self.span]
        if self.first:
            modules += [model.embed, getattr(model, "embed_positions", nn.Identity())]
        if self.last:
            modules += [model.norm, model.head]
        return (parameter for module in modules for parameter in module.parameters())

    def forward(self, given: Tensor, routed: Tensor | None = None) -> Any:
        """Hidden states (and statistics of the routers) for the next stage; of the last the loss, `[1]`."""
        pipeline = self._pipeline[0]
        model = pipeline.model
        tokens, positions, segments, labels = pipeline.parts[pipeline.micro_batch]
        hidden = model(tokens, positions, segments, span=self.span, hidden=None if self.first else given)
        statistics, real = model.router
        results = [hidden]
        if model.config.moe_layers:
            before = hidden.new_zeros(2, model.config.num_experts, dtype=torch.float32)
            own = (torch.stack(pair) for pair in statistics)
            results.append(sum(own, before if routed is None else routed))
        if self.last:
            return self._loss(results, labels, real)
        # so that torch sends a gradient back, also where all weights until here are frozen
        results = [x if x.requires_grad else x.detach().requires_grad_() for x in results]
        return tuple(results) if len(results) > 1 else results[0]

    def _loss(self, results: list[Tensor], labels: Tensor, real: Any) -> Tensor:
        """The gradient of the head is made here: so nothing of its size waits for the backward pass, and that
        can be done in two parts."""
        leaves = [x.detach().requires_grad_() for x in results]
        value = self._pipeline[0].objective(leaves[0], labels, leaves[1] if len(leaves) > 1 else None, real)
        value.backward()
        slopes = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
        return _Known.apply(value.detach().view(1), slopes, *results)


class _Known(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.slopes = slopes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.slopes


def _given(loss: Tensor, _: Tensor) -> Tensor:
    return loss.sum()
