"""Sizes instead of tensors: a few lines of autograd that keep account of what is alive.

A `Room` is a storage: it counts from when it is made until nothing refers to it, as torch's memory does. So
what stands for the model's code keeps as long as that keeps, variable by variable, and the peak of a forward
and a backward pass comes out without a tensor.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

Arrival = Literal["keep", "widen", "add"]
"""What becomes of a parameter's gradient: it stays; it is added to one in fewer bits, which a wider one takes
the place of; it is added to one that is there, or used up."""


class Room:
    """A storage of `size` bytes."""

    __slots__ = ("size", "tape")

    def __init__(self, tape: "Tape", size: int) -> None:
        self.tape, self.size = tape, size
        tape.alive += size
        if tape.alive > tape.most:
            tape.most = tape.alive

    def __del__(self) -> None:
        self.tape.alive -= self.size


class Part:
    """What is kept of a storage of which others have the rest: it is put together when gradients come to what
    was made of it, and let go when it is last read (`parallel.tensor`)."""

    __slots__ = ("left", "own", "readers", "size", "whole")

    def __init__(self, own: Room, size: int) -> None:
        self.own, self.size = own, size
        self.readers = self.left = 0
        self.whole: Room | None = None

    def begin(self) -> None:
        if self.readers and self.whole is None:
            self.whole, self.left = Room(self.own.tape, self.size), self.readers

    def read(self) -> Room:
        self.begin()
        whole, self.left = self.whole, self.left - 1
        assert whole is not None
        if not self.left:
            self.whole = None
        return whole


class Node:
    """What an operation leaves for its backward pass."""

    __slots__ = ("back", "entered", "gradient", "inputs", "saved", "through", "trained")

    def __init__(
        self, inputs: list[tuple["Node | None", int]], trained: int, back: int, through: bool
    ) -> None:
        self.inputs, self.trained, self.back, self.through = inputs, trained, back, through
        self.saved: list[Room | Part] = []
        self.entered: Part | None = None
        """what begins to be put together when a gradient comes"""
        self.gradient: Room | None = None

    def receive(self, tape: "Tape", found: Room) -> None:
        """Adds a gradient to those that came before: in place, where nobody else has theirs."""
        if self.gradient is None:
            self.gradient = found
        elif sys.getrefcount(self.gradient) > 2:
            self.gradient = tape.room(found.size)


class Value:
    """A tensor: its storage, the node that made it (None: nothing before it needs a gradient), and what is
    kept where all of it would be."""

    __slots__ = ("node", "part", "room")

    def __init__(self, room: Room, node: Node | None) -> None:
        self.room, self.node = room, node
        self.part: Part | None = None


class StopRecomputingError(Exception):
    """A recomputation has made all that was saved."""


class Tape:
    """`alive`: bytes of all rooms now; `most`: the most since it was last set."""

    def __init__(self, arrival: Arrival = "keep") -> None:
        self.alive = self.most = 0
        self.arrival = arrival
        self.nodes: list[Node] = []
        self.gradients: list[Room] = []
        """of parameters: they stay"""
        self.grown = 0
        """bytes of `gradients` that were there before, in fewer bits"""
        self.forgets = False
        """checkpointing: what is saved is noted and let go"""
        self.holders: list[Node] = []
        """the nodes that saved something meanwhile, in order"""
        self.captured: list[Room] = []
        """what functions to be run again refer to: it is not forgotten"""
        self.place: int | None = None
        """recomputing: the holder that gets what is saved next"""
        self.kept: list[Room] | None = None
        """selective checkpointing: results of products and of attention, in order: filled, then emptied"""

    def room(self, size: int) -> Room:
        return Room(self, size)

    def value(self, size: int, needs_gradient: bool) -> Value:
        """An input; where it needs a gradient, that of it stays in its node."""
        return Value(self.room(size), Node([], 0, 0, False) if needs_gradient else None)

    def operation(
        self,
        inputs: Sequence[Value],
        size: int,
        *,
        saves: Sequence[Value] = (),
        saves_out: bool = False,
        extra: int = 0,
        weight: bool = False,
        trained: int = 0,
        temporary: int = 0,
        back: int = 0,
        product: bool = False,
        through: bool = False,
    ) -> Value:
        """The result, of `size` bytes, of an operation on `inputs`.

        For the backward pass, where there is one, it keeps the inputs `saves`, the result with `saves_out`,
        `extra` bytes that it makes besides, and with `weight` something that is there anyway. `trained`:
        bytes of the parameters whose gradient it makes. `temporary`, `back`: bytes it takes besides while it
        runs forward and backward. `product`: it is of the kind that selective checkpointing keeps.
        `through`: its inputs' gradients are that of the result.
        """
        needs = trained > 0 or any(value.node is not None for value in inputs)
        holds = needs and bool(saves or saves_out or extra or weight)
        held: list[Room | Part] = [value.part or value.room for value in saves] if holds else []
        if holds and not (saves_out or extra):
            self._stop_if_last(held)
        room = self._made(size, product)
        besides = self._made(extra, product) if extra else None
        if temporary:
            self.most = max(self.most, self.alive + temporary)
        if not needs:
            return Value(room, None)
        if besides is not None:
            held.append(besides)
        if saves_out:
            held.append(room)
        if saves_out or extra:
            self._stop_if_last(held)
        sources = [(value.node, value.room.size) for value in inputs]
        node = Node(sources, trained, back, through)
        for kept in held:
            if isinstance(kept, Part):
                kept.readers += 1
        if self.place is not None:
            node.saved = held  # until the recomputation ends
            if holds:
                self.holders[self.place].saved = held
                self.place += 1
        elif self.forgets:
            if holds:
                self.holders.append(node)
        else:
            node.saved = held
        self.nodes.append(node)
        return Value(room, node)

    def capture(self, *values: Value) -> None:
        """Values that a function to be run again refers to."""
        if self.forgets:
            self.captured += [value.room for value in values]

    def keep(self, size: int) -> None:
        """Further results of products, which selective checkpointing keeps."""
        if self.kept is not None:
            self._made(size, True)

    def _made(self, size: int, product: bool) -> Room:
        if product and self.kept is not None and self.place is not None:
            return self.kept.pop(0)
        room = self.room(size)
        if product and self.kept is not None:
            self.kept.append(room)
        return room

    def _stop_if_last(self, held: list[Room | Part]) -> None:
        if self.place is not None and self.place == len(self.holders) - 1:
            self.holders[self.place].saved = held
            raise StopRecomputingError

    def recompute(self, run: Callable[[], object]) -> None:
        """Runs again what was forgotten, up to the last thing that was saved: for its backward pass."""
        graph, self.nodes, self.forgets, self.place = self.nodes, [], False, 0
        with suppress(StopRecomputingError):
            run()
        self.nodes, self.place = graph, None
        self.captured.clear()

    def twice(self, run: Callable[[], Value], gradient: int) -> tuple[int, int]:
        """Runs what forgets all it saves, and again for its backward pass from a gradient of that size.

        Gives the most that was alive each time.
        """
        self.forgets = True
        out = run()
        forward, node = self.most, out.node
        assert node is not None
        del out
        self.most = self.alive
        incoming = self.room(gradient)
        self.recompute(run)
        self.backward(node, incoming)
        return forward, self.most

    def backward(self, node: Node, gradient: Room) -> None:
        """Walks the graph from its last node; gradients of trained parameters are added to `gradients`."""
        node.gradient = gradient
        del gradient, node
        while self.nodes:
            self._back(self.nodes.pop())

    def _back(self, node: Node) -> None:
        incoming, node.gradient = node.gradient, None
        if incoming is None:
            node.saved.clear()
            return
        read = [kept.read() for kept in node.saved if isinstance(kept, Part)]
        made: list[tuple[Node, Room]] = []
        for source, size in node.inputs:
            if source is not None:
                made.append((source, incoming if node.through else self.room(size)))
        arrived = self.room(node.trained) if node.trained else None
        self.most = max(self.most, self.alive + node.back)
        if node.entered is not None:
            node.entered.begin()
        node.saved.clear()
        read.clear()
        del incoming
        if arrived is not None:
            self._arrive(arrived)
        del arrived
        while made:
            source, found = made.pop(0)
            source.receive(self, found)
            del found

    def _arrive(self, gradient: Room) -> None:
        if self.arrival == "keep":
            self.gradients.append(gradient)
        elif self.arrival == "widen":
            wider = self.room(2 * gradient.size)
            self.alive -= gradient.size  # the one that was there
            self.grown += gradient.size
            self.gradients.append(wider)
