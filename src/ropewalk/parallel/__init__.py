"""The parallel room: how a run is spread over processes. Model code knows nothing of it.

In: a model, a Layout, the processes that torchrun started. Out: the same model in parts, and a World in which
processes add up numbers. May import torch, model and errors.
"""

from ropewalk.layout import Layout
from ropewalk.parallel.context import context_refusal
from ropewalk.parallel.expert import expert_refusal
from ropewalk.parallel.places import axes_of, first_with, replicas
from ropewalk.parallel.sharding import divided, local, reduce_gradients, shard
from ropewalk.parallel.slices import has_partial_gradient, refusal
from ropewalk.parallel.stages import pipeline_refusal, spans
from ropewalk.parallel.state import Part, Stored, load_tensors, part_file, part_of, parts_of, write_parts
from ropewalk.parallel.world import World, processes, started

__all__ = [
    "Layout",
    "Part",
    "Stored",
    "World",
    "axes_of",
    "context_refusal",
    "divided",
    "expert_refusal",
    "first_with",
    "has_partial_gradient",
    "load_tensors",
    "local",
    "part_file",
    "part_of",
    "parts_of",
    "pipeline_refusal",
    "processes",
    "reduce_gradients",
    "refusal",
    "replicas",
    "shard",
    "spans",
    "started",
    "write_parts",
]
