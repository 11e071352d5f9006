"""What makes a step faster without changing it: compiled blocks, CUDA graphs, float8 products."""

import importlib.util
import os
import shutil

import torch
from torch import nn

from ropewalk.errors import UserError
from ropewalk.files import cache_directory
from ropewalk.model import Transformer

FLOAT8_LEAST = 4096 * 1024
"""Weights with fewer values stay in bfloat16: what casting costs, the product does not give back."""


def compile_blocks(model: Transformer, graphs: bool = False, sparing: bool = False) -> None:
    """torch.compile on each block, in place: all are one graph, which so is compiled once, not per layer.

    What was compiled is kept on disk and found by the next process. `graphs`: replayed as CUDA graphs, for
    which the shapes of a run are static enough. `sparing`: cheap results are made again even where a
    product's gradient reads them; else those are kept. UserError where there is no compiler to do it.
    """
    on_cpu = model.embed.weight.device.type == "cpu"
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("train.compile: there is no C++ compiler here; install g++, or leave it out")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "compiled"))
    from torch._functorch import config as partitioner

    if partitioner.ban_recompute_materialized_backward == sparing:
        torch.compiler.reset()  # what another run of this process has compiled keeps the other
        partitioner.ban_recompute_materialized_backward = not sparing
    options = {"triton.cudagraphs": True} if graphs else None
    for block in model.blocks.children():
        block.compile(options=options)


def use_float8(model: Transformer) -> None:
    """Large linear layers of the blocks multiply in float8 (arXiv 2209.05433; torchao), in place.

    Weights stay as they are; each factor of a product is cast for it, with one scale. Raises UserError where
    the GPU or torchao is missing.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability < (8, 9):
        raise UserError("train.precision: float8 needs a GPU of compute capability 8.9 or newer")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("train.precision: float8 needs torchao: pip install 'ropewalk[float8]'")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model.blocks,
        config=Float8LinearConfig.from_recipe_name("tensorwise"),
        module_filter_fn=lambda module, _: worth_float8(module),
    )


def worth_float8(module: nn.Module) -> bool:
    """Whether it is a trained linear layer of a size for float8."""
    return isinstance(module, nn.Linear) and module.weight.requires_grad and fits_float8(*module.weight.shape)


def fits_float8(outputs: int, inputs: int) -> bool:
    """Whether a matrix is large enough, and of sizes that the kernels take (multiples of 16)."""
    return outputs * inputs >= FLOAT8_LEAST and outputs % 16 == inputs % 16 == 0
