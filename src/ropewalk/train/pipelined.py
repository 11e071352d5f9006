"""A step of a pipeline: what its last stage minimizes, and what its ends tell each other afterwards."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ropewalk.data import Batch
from ropewalk.model import Transformer
from ropewalk.model.moe import load_balancing_loss
from ropewalk.parallel import World
from ropewalk.train.objective import head_loss_sum
from ropewalk.train.optim import Optimizer

TIED = "embed.weight"


def without_values(model: Transformer) -> Transformer:
    """A copy without numbers: every name, shape and type of a model of which a process keeps some blocks or
    experts."""
    empty = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


class PipelinedSteps:
    """Forward and backward passes of optimizer steps of `micro_batches` of `shape` (rows, tokens)."""

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        world: World,
        stages: Sequence[range],
        micro_batches: int,
        shape: tuple[int, int],
        chunk: int,
    ) -> None:
        from ropewalk.parallel.pipeline import Pipeline  # imports much of torch that no other layout needs

        self.model, self.optimizer, self.world, self.chunk = model, optimizer, world, chunk
        self.stages, self.rows = stages, micro_batches * shape[0] * world.layout.data
        self._losses: list[Tensor] = []
        self._scored = 1
        self._pipeline = Pipeline(
            model, world, stages, micro_batches, shape, self._objective, optimizer.receive
        )

    def compute(self, parts: Sequence[Batch], scored: int) -> list[Tensor]:
        """Adds the gradients of a step's micro-batches; the summed loss of each of them, in every process."""
        device = self.model.embed.weight.device
        self._losses, self._scored = [], scored
        tokens, positions = (
            torch.cat([getattr(part, name) for part in parts]).to(device, non_blocking=True)
            for name in ("tokens", "positions")
        )
        segments, labels = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("segments", "labels")
        )
        self._pipeline.step(tokens, positions, segments, labels)
        self._add_up_tied()
        wide = torch.promote_types(self.model.embed.weight.dtype, torch.float32)
        losses = (
            torch.stack(self._losses) if self._losses else torch.empty(len(parts), dtype=wide, device=device)
        )
        return list(self.world.broadcast_along_pipeline(losses, len(self.stages) - 1))

    def _objective(self, hidden: Tensor, labels: Tensor, routed: Tensor | None, real: Any) -> Tensor:
        loss = head_loss_sum(self.model, hidden, labels, self.chunk)
        self._losses.append(loss.detach())
        mean = loss / self._scored
        if routed is None:
            return mean
        if self.model.row_part is not None:
            routed, real = (
                self.model.row_part.summed(routed),
                self.model.row_part.summed(torch.as_tensor(real)),
            )
        config = self.model.config
        balance = load_balancing_loss([(routed[0], routed[1])], real * len(config.moe_layers))
        return mean + balance * config.router_aux_loss_coef * (len(labels) / self.rows)

    def _add_up_tied(self) -> None:
        """The gradients of an embedding that is the head, too: both ends of the pipeline have one of it."""
        layout, index = self.world.layout, self.world.index("pipeline")
        ends = layout.place(0), layout.place(len(self.stages) - 1)
        if not self.model.config.tie_word_embeddings or ends[0] == ends[1] or index not in ends:
            return
        if TIED in self.optimizer.parameters:
            other = ends[0] if index == ends[1] else ends[1]
            self.optimizer.change_gradient(TIED, lambda mine: self._plus(mine, other))

    def _plus(self, mine: Tensor, other: int) -> Tensor:
        group = self.world.group("pipeline")
        theirs = torch.empty_like(mine)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, group=group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
            ]
        )
        for work in works:
            work.wait()
        return mine + theirs
