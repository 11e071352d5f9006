"""Frozen weights in 4 bits: NormalFloat4 with double quantization (QLoRA, arXiv 2305.14314).

The type, the linear layer on it, and what torch's modules ask of a tensor; nf4_codes has the arithmetic.
"""

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.errors import UserError
from ropewalk.ops.nf4_codes import BLOCK, GROUP, is_traced, plain_values, quantize_values, write_values
from ropewalk.ops.product import product
from ropewalk.ops.reference import using_references

_PARTS = ("codes", "scale_codes", "scale_absmax", "offset")
_buffers = threading.local()


class NF4Tensor(torch.Tensor):
    """A frozen tensor that looks like its original (shape, dtype, device) and is held in 4 bits a value.

    Parts: `codes` uint8, two values a byte, the first in the high half; `scale_codes` uint8, one a block;
    `scale_absmax` float32, one a group of blocks; `offset` float32, 0-d. Values in row-major order; the last
    block is padded with zeros. `dtype` is what it dequantizes to. Made by `quantize` or `from_parts`.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_absmax: Tensor
    offset: Tensor
    group: int

    @staticmethod
    def __new__(
        cls, parts: Iterable[Tensor], shape: torch.Size, dtype: torch.dtype, group: int = GROUP
    ) -> "NF4Tensor":
        codes, scale_codes, scale_absmax, offset = parts
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        self.codes, self.scale_codes, self.scale_absmax = codes, scale_codes, scale_absmax
        self.offset, self.group = offset, group
        return self

    @classmethod
    def quantize(cls, tensor: Tensor) -> "NF4Tensor":
        """Rounds a floating tensor to NF4. Beyond the result it takes a few megabytes, and 4 bytes a block.

        Raises UserError for values that are not finite.
        """
        return cls(quantize_values(tensor.detach().reshape(-1)), tensor.shape, tensor.dtype)

    def dequantize(self, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a plain tensor: float32 products, rounded once to `dtype` (default: own dtype).

        `out`: a contiguous tensor of this shape to write them to. No gradient flows through it.
        """
        dtype = dtype or (self.dtype if out is None else out.dtype)
        parts = self.codes, self.scale_codes, self.scale_absmax, self.offset, self.group
        if not is_traced(self.codes):
            out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
            with torch.no_grad():
                write_values(*parts, out.view(-1))
            return out
        if self.device.type == "cpu":
            values = torch.ops.ropewalk.nf4_dequantize(*parts, list(self.shape), dtype)
        else:  # there a compiler fuses it
            values = plain_values(*parts).view(-1)[: self.numel()].view(self.shape).to(dtype)
        return values if out is None else out.copy_(values)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold it, by name: what is saved (plain tensors that safetensors takes)."""
        return {name: getattr(self, name) for name in _PARTS}

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> "NF4Tensor":
        """What `parts()` gave, put together again. Raises UserError where the parts do not fit the shape."""
        blocks = -(-math.prod(shape) // BLOCK)
        groups = parts["scale_absmax"].numel()
        group = GROUP
        while group > 1 and -(-blocks // group) < groups:
            group //= 2
        expected = (blocks * BLOCK // 2, blocks, -(-blocks // group), 1)
        found = tuple(parts[name].numel() for name in _PARTS)
        kinds = (torch.uint8, torch.uint8, torch.float32, torch.float32)
        if expected != found or any(parts[n].dtype != kind for n, kind in zip(_PARTS, kinds, strict=True)):
            raise UserError(f"NF4 parts of sizes {found} do not make a tensor of shape {tuple(shape)}")
        return cls((parts[name] for name in _PARTS), torch.Size(shape), dtype, group)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes really held."""
        return sum(part.nbytes for part in self.parts().values())

    def _like(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "NF4Tensor":
        """The same with `function` applied to each part."""
        return NF4Tensor(map(function, self.parts().values()), self.shape, dtype or self.dtype, self.group)

    def _piece(self, layout: Tensor) -> "NF4Tensor":
        """The values that `layout`, a view of a plain tensor of this shape, covers; whole blocks only."""
        start, size = layout.storage_offset(), layout.numel()
        if not layout.is_contiguous() or (size != self.numel() and (start % BLOCK or size % BLOCK)):
            raise UserError(
                f"an NF4 weight of shape {tuple(self.shape)} cannot give a piece of {tuple(layout.shape)} at "
                f"value {start}: pieces are contiguous and hold whole blocks of {BLOCK} values"
            )
        if size == self.numel():
            return NF4Tensor(self.parts().values(), layout.shape, self.dtype, self.group)
        first, blocks = start // BLOCK, size // BLOCK
        whole = self._regrouped(math.gcd(self.group, first, blocks))
        parts = (
            self.codes[start // 2 : (start + size) // 2],
            self.scale_codes[first : first + blocks],
            whole.scale_absmax[first // whole.group : (first + blocks) // whole.group],
            self.offset,
        )
        return NF4Tensor(parts, layout.shape, self.dtype, whole.group)

    def columns(self, start: int, count: int) -> "NF4Tensor":
        """Some columns of a matrix, in memory of their own; UserError where they cut through blocks."""
        rows, width = self.shape
        if width % BLOCK or start % BLOCK or count % BLOCK:
            raise UserError(f"{count} of {width} columns of an NF4 weight cut through its blocks of {BLOCK}")
        single = self._regrouped(1)  # a row's blocks lie in many groups

        def cut(part: Tensor) -> Tensor:
            table = part.view(rows, -1)
            first, wide = (table.shape[1] * n // width for n in (start, count))
            return table[:, first : first + wide].reshape(-1).clone()

        parts = (*map(cut, (single.codes, single.scale_codes, single.scale_absmax)), self.offset)
        return NF4Tensor(parts, torch.Size((rows, count)), self.dtype, 1)

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """torch's fully_shard: what the processes send each other, and what stays here."""
        return (self.codes, self.scale_codes, self.scale_absmax), self.offset

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], offset: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple["NF4Tensor", tuple[Tensor, ...]] | None:
        """torch's fully_shard: the whole weight of what was sent; `out` already holds those very tensors."""
        if out is not None:
            return None
        shape = torch.Size((gathered[0].numel() * 2 // math.prod(self.shape[1:]), *self.shape[1:]))
        return NF4Tensor((*gathered, offset), shape, self.dtype, self.group), gathered

    def _regrouped(self, group: int) -> "NF4Tensor":
        """The same values in smaller groups of blocks, whose maxima are repeated."""
        absmax = self.scale_absmax.repeat_interleave(self.group // group)
        parts = self.parts() | {"scale_absmax": absmax[: -(-self.scale_codes.numel() // group)]}
        return NF4Tensor(parts.values(), self.shape, self.dtype, group)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NF4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_PARTS), (self.dtype, self.group)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "NF4Tensor":
        return NF4Tensor((parts[name] for name in _PARTS), size, *meta)

    def _stable_hash_for_caching(self) -> str:
        """Lets torch.compile keep compiled code over restarts."""
        return f"NF4Tensor {tuple(self.shape)} {self.dtype} {self.group}"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return nf4_linear(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(function)
        if handler is None:
            raise NotImplementedError(f"{function} is not defined for an NF4Tensor: take its .dequantize()")
        return handler(function, *args, **(kwargs or {}))


def nf4_linear(x: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight.dequantize(), bias)`; gradients for x and bias, none for the weight.

    x [..., in] in the weight's dtype -> [..., out]. The weight is dequantized for the product only, and again
    in the backward pass. What `F.linear` does with an NF4Tensor.
    """
    if using_references():
        return F.linear(x, weight.dequantize(), bias)
    return _NF4Linear.apply(x, weight, bias)


def dense(weight: Tensor) -> Tensor:
    """The weight itself; an NF4Tensor's values, in a buffer that the next call overwrites. No gradient.

    For use inside an operation, at once: on a CPU one buffer for a thread and dtype serves all weights; on
    other devices torch's caching allocator hands out the same memory again.
    """
    if not isinstance(weight, NF4Tensor):
        return weight
    if weight.device.type != "cpu" or is_traced(weight.codes):
        return weight.dequantize()
    kept: dict[Any, Tensor] = _buffers.__dict__
    buffer = kept.get(weight.dtype)
    if buffer is None or buffer.numel() < weight.numel():
        with torch.inference_mode(False):  # where generation makes it, training uses it too
            buffer = kept[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
    return weight.dequantize(out=buffer[: weight.numel()].view(weight.shape))


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        rows = x.reshape(-1, x.shape[-1])
        return product(rows, dense(weight).t(), bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        rows = slope.reshape(-1, slope.shape[-1])
        d_x = product(rows, dense(weight)).view(*slope.shape[:-1], -1) if needs_x else None
        return d_x, None, rows.sum(0) if needs_bias else None


# What torch's modules, state_dict and fully_shard ask of a tensor.


def _same(function: Any, tensor: NF4Tensor, *args: Any, **kwargs: Any) -> NF4Tensor:
    """detach, clone, copies: the operation on each part."""
    kwargs.pop("memory_format", None)
    return tensor._like(lambda part: function(part, *args, **kwargs))


def _to_copy(function: Any, tensor: NF4Tensor, **kwargs: Any) -> NF4Tensor:
    """Another device for the parts; another dtype to dequantize to."""
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    return tensor._like(lambda part: function(part, **kwargs), dtype)


def _copy(function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Into a plain tensor: dequantized. Into NF4: parts are copied, other values quantized."""
    if not isinstance(target, NF4Tensor):
        assert isinstance(source, NF4Tensor)
        return target.copy_(source.dequantize())
    if target.shape != source.shape:
        raise RuntimeError(f"cannot copy {tuple(source.shape)} into NF4 of {tuple(target.shape)}")
    if not isinstance(source, NF4Tensor):
        source = NF4Tensor.quantize(source.to(target.dtype))
    if source.group != target.group:
        source = source._regrouped(target.group)
    for name, part in source.parts().items():
        getattr(target, name).copy_(part, non_blocking=non_blocking)
    return target


def _view(function: Any, tensor: NF4Tensor, *args: Any, **kwargs: Any) -> Any:
    """The whole in another shape, or whole blocks of it: where the operation puts a plain tensor's values."""
    layout = function(torch.empty(tensor.shape, device="meta"), *args, **kwargs)
    if isinstance(layout, Tensor):
        return tensor._piece(layout)
    if len({piece.shape for piece in layout}) > 1:
        raise UserError(f"the {tensor.shape[0]} rows of an NF4 weight cannot be shared out equally")
    return [tensor._piece(piece) for piece in layout]


def _new_zeros(function: Any, tensor: NF4Tensor, size: Any, **kwargs: Any) -> NF4Tensor:
    """Room for a piece of that size: its groups are those that `_piece` makes."""
    shape = torch.Size(size)
    blocks = -(-math.prod(shape) // BLOCK)
    group = math.gcd(tensor.group, blocks)
    sizes = ((blocks * BLOCK // 2,), (blocks,), (-(-blocks // group),), ())
    parts = (function(part, n) for part, n in zip(tensor.parts().values(), sizes, strict=True))
    return NF4Tensor(parts, shape, tensor.dtype, group)


aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten._pin_memory.default: _same,
    aten.empty_like.default: _to_copy,
    aten.zeros_like.default: _to_copy,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.new_zeros.default: _new_zeros,
    aten.new_empty.default: _new_zeros,
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.as_strided.default,
            aten.slice.Tensor,
            aten.split.Tensor,
            aten.split_with_sizes.default,
        ),
        _view,
    ),
}
