"""Data parallelism: weights, gradients and states divided over the processes, or copied to each of them.

One way for all of it, torch's fully_shard (FSDP2, arXiv 2304.11277) block by block. Replication alone is a
mesh whose shards are whole; ZeRO's stages differ in when weights are gathered and gradients divided.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ropewalk.layout import Layout
from ropewalk.model import Transformer
from ropewalk.model.moe import MixtureOfExperts
from ropewalk.ops import QuantizedTensor
from ropewalk.parallel.context import divide_rows
from ropewalk.parallel.expert import divide_experts
from ropewalk.parallel.slices import is_expert
from ropewalk.parallel.stages import keep_stages
from ropewalk.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(model: Transformer, world: World, stages: Sequence[range] = ()) -> None:
    """Divides `model` over the mesh, in place; gradients are sums over the processes, reduced in float32.

    First the products (`tensor`), then the tokens of rows (`context`), the blocks (`pipeline`, in runs that
    `stages` names) and the experts of mixtures, then what each process has of the weights. UserError where
    those cannot be.
    """
    if world.mesh is None:
        return
    if world.layout.tensor > 1:
        from ropewalk.parallel.tensor import divide

        divide(model, world)
    if world.layout.context > 1:
        divide_rows(model, world)
    layout = world.layout
    if layout.pipeline > 1:
        keep_stages(model, world, stages)
    if layout.expert > 1:
        divide_experts(model, world)
    if layout.pipeline > 1 and not _shared(layout):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "ignored_params": set(_not_gathered(model, world)),
    }
    # gradients of weights that are made apart need the very weights of the forward pass
    assert world.weights is not None
    mesh, experts = world.weights, world.experts
    # with two axes, fully_shard keeps float32 sums until the backward ends: only where there are copies
    if layout.replicate == 1:
        mesh = mesh[(mesh.mesh_dim_names or ())[1]]
    if experts is not None:
        experts = experts["expert_parts" if layout.expert_copies == 1 else ("expert_copies", "expert_parts")]
    again = layout.stage == 3 and not layout.split_backward
    for block in model.blocks:
        if experts is not None and isinstance(block.mlp, MixtureOfExperts):
            fully_shard(block.mlp.experts, mesh=experts, reshard_after_forward=again, **options)
        fully_shard(block, mesh=mesh, reshard_after_forward=again, **options)
    # the head meets the hidden states after the model's own forward: what is outside the blocks stays there
    fully_shard(model, mesh=mesh, reshard_after_forward=False, **options)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _shared(layout: Layout) -> bool:
    """Whether several processes have copies or parts of the same weights."""
    experts = layout.expert_copies * layout.expert_parts if layout.expert > 1 else 1
    return layout.replicate * layout.parts * experts > 1


def _not_gathered(model: Transformer, world: World) -> Iterator[nn.Parameter]:
    """Quantized weights of one part: fully_shard can gather them only of several."""
    for name, parameter in model.named_parameters():
        apart = world.experts is not None and is_expert(name)
        parts = world.layout.expert_parts if apart else world.layout.shard
        if parts == 1 and isinstance(parameter, QuantizedTensor):
            yield parameter


def reduce_gradients(model: Transformer, world: World, last: bool) -> None:
    """Before the backward pass of a micro-batch: whether its gradients are sent at once, and weights let go.

    At stage 1 gradients are added up whole, and divided with the last micro-batch of a step. Below stage 3
    weights are gathered once a step.
    """
    if world.mesh is None or world.layout.stage == 3 or not is_sharded(model):
        return
    own = next(_units(model))  # the model's own: for all of it
    own.set_reshard_after_backward(last)
    if world.layout.stage == 1:
        own.set_requires_gradient_sync(last)


def replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts another parameter in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = parameter


def divided(model: Transformer, world: World) -> None:
    """Lets go of gathered weights, so that the parameters are the parts again."""
    if world.mesh is not None:
        for module in _units(model):
            module.reshard()


def is_sharded(model: Transformer) -> bool:
    """Whether `shard` has divided its weights over processes that have the same ones, or made them copies."""
    return next(_units(model), None) is not None


def _units(model: Transformer) -> "Iterator[FSDPModule]":
    """The model and its blocks, after `shard`."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def local(tensor: Tensor) -> Tensor:
    """The part of it that is here; the tensor itself where it is whole. Same memory, no gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor
