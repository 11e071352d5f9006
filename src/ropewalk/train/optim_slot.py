"""One trained parameter as an optimizer sees it: its master, gradient and state, taken in pieces.

A piece has at most CHUNK numbers. So what an update needs in float32 beside the tensors that are kept (for a
bfloat16 gradient, a weight without master, a state in 8 bits) is a few MB however large the matrix, in cache.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ropewalk.ops.native import on_gpu
from ropewalk.parallel import local
from ropewalk.train.optim_lowbit import LowBitState, stochastic_round

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}
LOW = (torch.bfloat16, torch.float16)


class Slot:
    """The `index`-th trained parameter. `weight` is what the update reads and writes: the parameter itself,
    its float32 master, or (with `host`) its copy in the host's memory, where gradient and state are then."""

    def __init__(
        self,
        index: int,
        name: str,
        parameter: nn.Parameter,
        masters: bool,
        host: "Host | None",
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source, self.parameter = parameter, local(parameter)
        """the model's, which gets gradients; and what of it is here, in the same memory"""
        if not self.parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous, so it cannot be updated piece by piece")
        self.index, self.name, self.host, self.combine = index, name, host, combine
        wants_master = parameter.dtype in LOW and (masters or parameter.dtype != torch.bfloat16)
        dtype = torch.float32 if wants_master else parameter.dtype
        self.weight = self.parameter
        if host is not None:
            self.weight = host.copy(self.parameter, dtype)
        elif wants_master:
            self.weight = self.parameter.to(dtype)
        self.gradient: Tensor | None = None
        self.count = 0
        """updates done"""
        self.state: dict[str, Tensor | LowBitState] = {}
        """from the first update on"""

    def receive(self) -> None:
        """Takes the gradient that backward has just made away from the parameter."""
        gradient, self.source.grad = self.source.grad, None
        assert gradient is not None
        gradient = local(gradient)
        if self.combine is not None:
            gradient = self.combine(gradient)
        if self.host is not None:
            self.host.fetch(gradient, self.add)
        else:
            self.add(gradient)

    def add(self, gradient: Tensor) -> None:
        """A first gradient is kept as it is, bfloat16 too; from the second on they add up in float32."""
        self.gradient = gradient if self.gradient is None else _summed(self.gradient, gradient)

    def is_plain(self) -> bool:
        """Whether the update can work on the tensors themselves: all in float32, no master."""
        low = any(isinstance(value, LowBitState) for value in self.state.values())
        return self.weight is self.parameter and self.weight.dtype not in LOW and not low

    def tensors(self) -> dict[str, Tensor]:
        """By kind: `master`, and once updated `step` and the state's; the live ones but for `step`."""
        found = {"master": self.weight.detach()}
        if self.state:
            found["step"] = torch.tensor(float(self.count))
        for kind, value in self.state.items():
            if isinstance(value, LowBitState):
                found |= {f"{kind}_codes": value.codes, f"{kind}_scale": value.scale}
            else:
                found[kind] = value
        return found

    def show(self, start: int = 0, stop: int | None = None) -> None:
        """Writes (a run of) the weight to the parameter, where that is another tensor."""
        if self.weight is self.parameter:
            return
        source, target = self.weight.view(-1)[start:stop], self.parameter.view(-1)[start:stop]
        if self.host is not None:
            source = self.host.copy(source, target.dtype)
        target.copy_(source, non_blocking=True)


class Piece(NamedTuple):
    """The numbers `start` to `stop` of a slot's flattened tensors."""

    slot: Slot
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        return flat if self.stop - self.start == len(flat) else flat[self.start : self.stop]

    def weight(self) -> Tensor:
        """In float32, for `store`: the weight itself, or a copy where it has fewer bits."""
        return full(self.of(self.slot.weight))

    def gradient(self, scale: float = 1.0) -> Tensor:
        """In float32 and times `scale`: the kept one where it is that already."""
        assert self.slot.gradient is not None
        gradient = full(self.of(self.slot.gradient))
        return gradient if scale == 1.0 else gradient * scale

    def state(self, kind: str) -> Tensor:
        """In float32, for `keep`: the state itself, or a copy where it has fewer bits."""
        value = self.slot.state[kind]
        return value.read(self.start, self.stop) if isinstance(value, LowBitState) else self.of(value)

    def keep(self, kind: str, numbers: Tensor) -> None:
        value = self.slot.state[kind]
        if isinstance(value, LowBitState):
            value.write(self.start, self.stop, numbers)

    def store(self, weight: Tensor, seed: int) -> None:
        """The updated `weight` goes back, and on to the parameter."""
        self.round(weight, seed)
        self.slot.show(self.start, self.stop)

    def round(self, weight: Tensor, seed: int) -> None:
        """The updated `weight` goes back, where it is a copy."""
        if self.slot.weight.dtype in LOW:
            draw = (seed, self.slot.count, self.slot.index, self.start)
            stochastic_round(weight, self.of(self.slot.weight.detach()), draw)


class Host:
    """Pinned host memory for the slots of one device; gradients arrive there while backward goes on.

    On the CPU, where only tests use it, the same steps are plain copies.
    """

    IN_FLIGHT = 16
    """gradients on their way, after which backward waits for the first of them"""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arriving: deque[tuple[torch.Event | None, Tensor, Callable[[Tensor], None]]] = deque()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.stream is not None)

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """On the host, complete on return. torch reuses it only when copies from it are done."""
        return self.empty(tensor.shape, dtype).copy_(tensor)

    def fetch(self, gradient: Tensor, deliver: Callable[[Tensor], None]) -> None:
        """Starts a copy of `gradient`; `deliver` gets it later, in `finish` at the latest."""
        host, event = self.empty(gradient.shape, gradient.dtype), None
        if self.stream is None:
            host.copy_(gradient)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(gradient.device))
            with torch.cuda.stream(self.stream):
                host.copy_(gradient, non_blocking=True)
                gradient.record_stream(self.stream)
                event = self.stream.record_event()
        self._arriving.append((event, host, deliver))
        self.finish(self.IN_FLIGHT)

    def finish(self, but: int = 0) -> None:
        """Waits until at most `but` gradients are on their way."""
        while len(self._arriving) > but:
            event, host, deliver = self._arriving.popleft()
            if event is not None:
                event.synchronize()
            deliver(host)


def _summed(total: Tensor, part: Tensor) -> Tensor:
    """Of gradients, in float32; `total` is used up."""
    if on_gpu(total) and part.dtype in LOW and total.is_contiguous() and part.is_contiguous():
        from ropewalk.ops.elementwise_kernel import add

        return add(total, part)
    return full(total).add_(part)


def full(tensor: Tensor) -> Tensor:
    """In float32 where it has fewer bits, else itself."""
    return tensor.float() if tensor.dtype in LOW else tensor


def gradients(batch: Sequence[Piece]) -> list[Tensor]:
    """Of some pieces, each as its `gradient`; those with fewer bits are copied by one kernel on a GPU."""
    found = []
    for piece in batch:
        assert piece.slot.gradient is not None
        found.append(piece.of(piece.slot.gradient))
    low = [gradient for gradient in found if gradient.dtype in LOW]
    copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in low]
    if low:
        torch._foreach_copy_(copies, low)
    coming = iter(copies)
    return [next(coming) if gradient.dtype in LOW else gradient for gradient in found]


def show(batch: Sequence[Piece]) -> None:
    """Writes the updated weights of some pieces to their parameters, where these are other tensors."""
    near = [p for p in batch if p.slot.host is None and p.slot.weight is not p.slot.parameter]
    if near:
        torch._foreach_copy_([p.of(p.slot.parameter) for p in near], [p.of(p.slot.weight) for p in near])
    for piece in batch:
        if piece.slot.host is not None:
            piece.slot.show(piece.start, piece.stop)


def pieces(slot: Slot, whole: int = 1) -> Iterator[Piece]:
    """All of a slot, in order, in pieces that hold a multiple of `whole` numbers."""
    total = slot.parameter.numel()
    length = max(CHUNK[slot.weight.device.type] // whole, 1) * whole
    for start in range(0, max(total, 1), length):  # an empty part is a piece too
        yield Piece(slot, start, min(start + length, total))


def batches(slots: Sequence[Slot]) -> Iterator[list[Piece]]:
    """All pieces in order, as many small ones together as make CHUNK numbers: one kernel for all of them.

    Slots that need nothing converted are not cut, and come first, all in one batch.
    """
    batch = [Piece(slot, 0, slot.parameter.numel()) for slot in slots if slot.is_plain()]
    count = sum(CHUNK.values()) if batch else 0
    for piece in (piece for slot in slots if not slot.is_plain() for piece in pieces(slot)):
        length = piece.stop - piece.start
        if batch and count + length > CHUNK[piece.slot.weight.device.type]:
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += length
    if batch:
        yield batch
