"""Frozen weights in few bits: what NF4 and int8 share, the linear layer on them, what torch asks of them."""

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.errors import UserError
from ropewalk.ops.product import product
from ropewalk.ops.reference import using_references

_buffers = threading.local()


class QuantizedTensor(torch.Tensor):
    """A frozen tensor that looks like its original (shape, dtype, device) and is held in few bits a value.

    Its parts are plain tensors, under the names in `PARTS`, `codes` first. `dtype` is what it dequantizes to.
    Made by `quantize` or `from_parts` of a kind: NF4Tensor, Int8Tensor.
    """

    PARTS: ClassVar[dict[str, torch.dtype]]
    """Names and types of the parts."""
    codes: Tensor

    @staticmethod
    def __new__(
        cls: Any, parts: Iterable[Tensor], shape: torch.Size, dtype: torch.dtype, *form: int
    ) -> "QuantizedTensor":
        """`form`: what besides shape and dtype says how the parts are to be read (`_form`)."""
        held = dict(zip(cls.PARTS, parts, strict=True))
        self: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=held["codes"].device
        )
        for name, part in held.items():
            setattr(self, name, part)
        return self

    # what each kind says for itself

    @classmethod
    def quantize(cls, tensor: Tensor) -> Self:
        """Rounds a floating tensor. Raises UserError for values that are not finite."""
        raise NotImplementedError

    @classmethod
    def part_shapes(cls, shape: tuple[int, ...], *form: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts of a tensor of this shape."""
        raise NotImplementedError

    def columns(self, start: int, count: int) -> Self:
        """Some columns of a matrix, in memory of their own; UserError where they cannot be cut out."""
        raise NotImplementedError

    def _write(self, out: Tensor) -> None:
        """The values into `out`, contiguous and of any floating type: float32 products, rounded once."""
        raise NotImplementedError

    def _traced(self, dtype: torch.dtype) -> Tensor:
        """The same values by operations that a compiler takes."""
        raise NotImplementedError

    def _unit(self) -> int:
        """Values that cannot be parted: pieces hold whole units."""
        raise NotImplementedError

    def _cut(self, first: int, count: int, shape: torch.Size) -> Self:
        """So many units from the first on, as a tensor of this shape; in the same memory where it can be."""
        raise NotImplementedError

    def _form(self) -> tuple[int, ...]:
        return ()

    def _form_of_piece(self, shape: torch.Size) -> tuple[int, ...]:
        """The form of what `_cut` gives for this shape."""
        return ()

    @classmethod
    def _form_of_parts(cls, parts: dict[str, Tensor]) -> tuple[int, ...]:
        return ()

    def _reformed(self, form: tuple[int, ...]) -> Self:
        """The same values in another form."""
        return self

    # what follows from it

    def dequantize(self, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a plain tensor: float32 products, rounded once to `dtype` (default: own dtype).

        `out`: a contiguous tensor of this shape to write them to. No gradient flows through it.
        """
        dtype = dtype or (self.dtype if out is None else out.dtype)
        if is_traced(self.codes):
            values = self._traced(dtype)
            return values if out is None else out.copy_(values)
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        with torch.no_grad():
            self._write(out)
        return out

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold it, by name: what is saved (plain tensors that safetensors takes)."""
        return {name: getattr(self, name) for name in self.PARTS}

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        """What `parts()` gave, put together again. Raises UserError where the parts do not fit the shape."""
        form = cls._form_of_parts(parts)
        shapes = cls.part_shapes(shape, *form)
        found = tuple(parts[name].numel() for name in cls.PARTS)
        wrong = any(parts[name].dtype != kind for name, kind in cls.PARTS.items())
        if wrong or found != tuple(map(math.prod, shapes)):
            raise UserError(
                f"{cls.__name__} parts of sizes {found} do not make a tensor of shape {tuple(shape)}"
            )
        held = (parts[name].view(size) for name, size in zip(cls.PARTS, shapes, strict=True))
        return cls(held, torch.Size(shape), dtype, *form)

    @classmethod
    def unfilled(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        """One whose parts have room but no values yet: what a plan looks at."""
        sizes = zip(cls.part_shapes(shape), cls.PARTS.values(), strict=True)
        return cls((torch.empty(size, dtype=kind) for size, kind in sizes), torch.Size(shape), dtype)

    @classmethod
    def part_bytes(cls, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of the codes of a tensor of this shape, and of all constants that belong to them."""
        sizes = zip(cls.part_shapes(shape), cls.PARTS.values(), strict=True)
        codes, *constants = (math.prod(size) * kind.itemsize for size, kind in sizes)
        return codes, sum(constants)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes really held."""
        return sum(part.nbytes for part in self.parts().values())

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """torch's fully_shard: what the processes send each other, and what stays here (all have it)."""
        parts = self.parts().values()
        return tuple(p for p in parts if p.dim()), tuple(p for p in parts if not p.dim())

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], kept: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Self, tuple[Tensor, ...]] | None:
        """torch's fully_shard: the whole weight of what was sent; `out` already holds those very tensors."""
        if out is not None:
            return None
        processes = gathered[0].numel() // self.codes.numel()
        shape = torch.Size((processes * self.shape[0], *self.shape[1:]))
        return type(self)((*gathered, *kept), shape, self.dtype, *self._form()), gathered

    def _like(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        """The same with `function` applied to each part."""
        parts = map(function, self.parts().values())
        return type(self)(parts, self.shape, dtype or self.dtype, *self._form())

    def _piece(self, layout: Tensor) -> Self:
        """The values that `layout`, a view of a plain tensor of this shape, covers; whole units only."""
        start, size, unit = layout.storage_offset(), layout.numel(), self._unit()
        if layout.is_contiguous() and size == self.numel():
            return type(self)(self.parts().values(), layout.shape, self.dtype, *self._form())
        if not layout.is_contiguous() or start % unit or size % unit:
            raise UserError(
                f"a quantized weight of shape {tuple(self.shape)} cannot give a piece of "
                f"{tuple(layout.shape)} at value {start}: pieces are contiguous and hold whole blocks of "
                f"{unit} values that share a scale"
            )
        return self._cut(start // unit, size // unit, layout.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = type(self).__name__
        return f"{name}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.PARTS), (self.dtype, *self._form())

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Self:
        return cls((parts[name] for name in cls.PARTS), size, *meta)

    def _stable_hash_for_caching(self) -> str:
        """Lets torch.compile keep compiled code over restarts."""
        return f"{type(self).__name__} {tuple(self.shape)} {self.dtype} {self._form()}"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return quantized_linear(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(function)
        if handler is None:
            raise NotImplementedError(f"{function} is not defined for {cls.__name__}: take its .dequantize()")
        return handler(function, *args, **(kwargs or {}))


def is_traced(tensor: Tensor) -> bool:
    """Whether what is done with the tensor is only written down (compiled, or fake): nothing may be kept."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def check_finite(scales: Tensor) -> None:
    """UserError where the largest values of a weight's blocks or rows, `scales`, are not all finite."""
    if not scales.isfinite().all():
        raise UserError("a weight with values that are not finite cannot be quantized; look for NaN in it")


def quantized_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight.dequantize(), bias)`; gradients for x and bias, none for the weight.

    x [..., in] in the weight's dtype -> [..., out]. The weight is dequantized for the product only, and again
    in the backward pass. What `F.linear` does with a QuantizedTensor.
    """
    if using_references():
        return F.linear(x, weight.dequantize(), bias)
    return _QuantizedLinear.apply(x, weight, bias)


def dense(weight: Tensor) -> Tensor:
    """The weight itself; a quantized one's values, in a buffer that the next call overwrites. No gradient.

    For use inside an operation, at once: on a CPU one buffer for a thread and dtype serves all weights; on
    other devices torch's caching allocator hands out the same memory again.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight
    if weight.device.type != "cpu" or is_traced(weight.codes):
        return weight.dequantize()
    kept: dict[Any, Tensor] = _buffers.__dict__
    buffer = kept.get(weight.dtype)
    if buffer is None or buffer.numel() < weight.numel():
        with torch.inference_mode(False):  # where generation makes it, training uses it too
            buffer = kept[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
    return weight.dequantize(out=buffer[: weight.numel()].view(weight.shape))


def dequantized(weight: Tensor) -> Tensor:
    """What a weight stands for, as a plain tensor without a gradient; no copy where it is one."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach()


class _QuantizedLinear(torch.autograd.Function):
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


def _same(function: Any, tensor: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    """detach, clone, copies: the operation on each part."""
    kwargs.pop("memory_format", None)
    return tensor._like(lambda part: function(part, *args, **kwargs))


def _to_copy(function: Any, tensor: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    """Another device for the parts; another dtype to dequantize to."""
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    return tensor._like(lambda part: function(part, **kwargs), dtype)


def _copy(function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Into a plain tensor: dequantized. Into the same kind: parts are copied; other values are quantized."""
    if not isinstance(target, QuantizedTensor):
        assert isinstance(source, QuantizedTensor)
        return target.copy_(source.dequantize())
    if target.shape != source.shape:
        raise RuntimeError(f"cannot copy {tuple(source.shape)} into a quantized {tuple(target.shape)}")
    if type(source) is not type(target):
        source = type(target).quantize(dequantized(source).to(target.dtype))
    assert isinstance(source, QuantizedTensor)
    for name, part in source._reformed(target._form()).parts().items():
        getattr(target, name).copy_(part, non_blocking=non_blocking)
    return target


def _view(function: Any, tensor: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
    """The whole in another shape, or whole units of it: where the operation puts a plain tensor's values."""
    layout = function(torch.empty(tensor.shape, device="meta"), *args, **kwargs)
    if isinstance(layout, Tensor):
        return tensor._piece(layout)
    if len({piece.shape for piece in layout}) > 1:
        raise UserError(f"the {tensor.shape[0]} rows of a quantized weight cannot be shared out equally")
    return [tensor._piece(piece) for piece in layout]


def _new_zeros(function: Any, tensor: QuantizedTensor, size: Any, **kwargs: Any) -> QuantizedTensor:
    """Room for a piece of that size, in the form that `_cut` gives it."""
    shape = torch.Size(size)
    form = tensor._form_of_piece(shape)
    sizes = tensor.part_shapes(shape, *form)
    parts = (function(part, n) for part, n in zip(tensor.parts().values(), sizes, strict=True))
    return type(tensor)(parts, shape, tensor.dtype, *form)


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
