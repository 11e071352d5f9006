"""What the layers inside a block take: products with their adapters, and norms; on sizes (see `tape`).

What an operation saves is what its `save_for_backward` says, or torch's formula for its derivative.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ropewalk.ops.native import library
from ropewalk.ops.nf4_codes import _DEVICE_CHUNK
from ropewalk.ops.norm import _PARTS
from ropewalk.ops.product import _LEAST, _PANEL, float32_is_faster
from ropewalk.plan.tape import Arrival, Tape, Value
from ropewalk.train.compiling import fits_float8


@dataclass(frozen=True)
class Shape:
    """All that decides a block's memory. Sizes are those of one process of a tensor group."""

    rows: int
    tokens: int
    """of a row, of this process"""
    document: int
    """tokens of a document"""
    tensor: int
    """processes that share the tokens between the matrices"""
    context: int
    """processes that share the tokens of rows"""
    bytes: int
    """of a number"""
    device: Literal["cpu", "cuda"]
    compiled: bool
    float8: bool
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    rotated: float
    """share of a head that positions rotate"""
    norm: str
    placement: str
    parallel: bool
    qk_norm: str | None
    act: str
    gated: bool
    window: int | None
    softcap: bool
    experts: int
    """0: a plain MLP"""
    expert: int
    """processes that divide the experts"""
    chosen: int
    """experts of each token"""
    input_needs_gradient: bool
    trained: frozenset[str]
    """names of parameters, inside the block"""
    adapted: frozenset[str]
    """names of layers that carry an adapter"""
    method: str
    rank: int
    dropout: bool
    quantized: Literal["none", "nf4", "int8"]
    prefix: int
    """virtual tokens before every document that need a gradient"""
    arrival: Arrival = "keep"
    """what becomes of gradients of parameters"""


class Layers:
    """The layers of a block of that shape."""

    def __init__(self, shape: Shape, tape: Tape) -> None:
        self.shape, self.tape = shape, tape
        self.count = shape.rows * shape.tokens
        """tokens in the matrices"""
        self.apart = self.count // shape.tensor
        """tokens between them"""
        self.outside = self.apart * shape.hidden * shape.bytes
        self.native = shape.device == "cpu" and library() is not None
        self.widens = shape.device == "cpu" and shape.bytes == 2 and float32_is_faster()

    def norm(self, x: Value, name: str, count: int) -> Value:
        """`count` vectors: keeps x and a number or two for each."""
        shape, size = self.shape, x.room.size
        wide = size * 4 // shape.bytes if shape.bytes < 4 else 0
        weight, bias = f"{name}.weight" in shape.trained, f"{name}.bias" in shape.trained
        width = size // count // shape.bytes
        made = shape.bytes * width * (weight + bias)
        if shape.norm == "layer":
            return self.tape.operation(
                [x], size, saves=[x], extra=2 * shape.bytes * count, trained=made, weight=True
            )
        if self.native:
            sums = 4 * _PARTS * width if weight else 0
            return self.tape.operation([x], size, saves=[x], extra=4 * count, trained=made, back=sums)
        if shape.device == "cpu":
            return self.tape.operation(
                [x], size, saves=[x], extra=4 * count, trained=made, temporary=wide, back=wide
            )
        if shape.norm == "rms_plus_one" and wide:
            x = self.tape.operation([x], wide)
            y = self.tape.operation([x], wide, saves=[x], extra=4 * count, trained=made)
            return self.tape.operation([y], size)
        return self.tape.operation([x], size, saves=[x], extra=4 * count, trained=made)

    def linear(self, x: Value, name: str, inputs: int, outputs: int, count: int | None = None) -> Value:
        """[count, inputs] -> [count, outputs], with whatever stands around the layer."""
        shape = self.shape
        if name not in shape.adapted:
            return self.plain(x, name, inputs, outputs, count)
        count = self.count if count is None else count
        size, tape, rank = shape.bytes, self.tape, shape.rank
        out, low = count * outputs * size, count * rank * size
        if shape.method == "ia3":
            if name.endswith("down_proj"):
                scaled = tape.operation([x], x.room.size, saves=[x], trained=inputs * size, back=x.room.size)
                return self.plain(scaled, name, inputs, outputs, count)
            y = self.plain(x, name, inputs, outputs, count)
            return tape.operation([y], out, saves=[y], trained=outputs * size, back=out)
        if shape.method == "bottleneck":
            y = self.plain(x, name, inputs, outputs, count)
            dropped = self.dropout(y)
            down = tape.operation(
                [dropped],
                low,
                saves=[dropped],
                trained=(outputs + 1) * rank * size,
                product=True,
                weight=True,
            )
            bent = tape.operation([down], low, saves=[down])
            up = tape.operation(
                [bent], out, saves=[bent], trained=(rank + 1) * outputs * size, product=True, weight=True
            )
            return tape.operation([y, up], out, through=True)
        return self.low_rank(x, name, inputs, outputs, count)

    def low_rank(self, x: Value, name: str, inputs: int, outputs: int, count: int) -> Value:
        """LoRA and DoRA."""
        shape, tape = self.shape, self.tape
        size, rank = shape.bytes, shape.rank
        out, low = count * outputs * size, count * rank * size
        a, b = rank * inputs * size, outputs * rank * size
        dora = shape.method == "dora"
        if shape.dropout:
            y = self.plain(x, name, inputs, outputs, count)
            dropped = self.dropout(x)
            down = tape.operation([dropped], low, saves=[dropped], trained=a, product=True, weight=True)
            up = tape.operation([down], out, saves=[down], trained=b, product=True, weight=True)
            update = tape.operation([up], out)
            del up, down
            if dora:
                update = self.magnitude(update, out, outputs)
                base = tape.operation([dropped], out, product=True, weight=True)
                update = self.add_any(update, self.magnitude(base, out, outputs))
            return self.add_any(y, update)
        dense = self.dense(inputs, outputs)
        y = tape.operation(
            [x], out, saves=[x], extra=low, trained=a + b, temporary=dense, back=dense + low + a, product=True
        )
        return self.magnitude(y, out, outputs) if dora else y

    def magnitude(self, y: Value, out: int, outputs: int) -> Value:
        return self.tape.operation([y], out, saves=[y], trained=outputs * self.shape.bytes, back=out)

    def add_any(self, a: Value, b: Value) -> Value:
        return self.tape.operation([a, b], a.room.size, through=True)

    def dropout(self, x: Value) -> Value:
        """A CPU keeps the factors, a GPU a mask."""
        if not self.shape.dropout:
            return x
        factors = x.room.size if self.shape.device == "cpu" else x.room.size // self.shape.bytes
        return self.tape.operation([x], x.room.size, extra=factors)

    def dense(self, inputs: int, outputs: int) -> int:
        """A quantized weight's values, where they are made for one product (a CPU has a buffer for them), and
        what `ops.nf4_codes.write_values` makes NF4's with."""
        if self.shape.quantized == "none" or self.shape.device == "cpu":
            return 0
        numbers = inputs * outputs
        beside = 6 * min(_DEVICE_CHUNK, numbers) if self.shape.quantized == "nf4" else 0
        return numbers * self.shape.bytes + beside

    def plain(self, x: Value, name: str, inputs: int, outputs: int, count: int | None = None) -> Value:
        shape = self.shape
        count = self.count if count is None else count
        weight, bias = f"{name}.weight" in shape.trained, f"{name}.bias" in shape.trained
        made = shape.bytes * (weight * inputs * outputs + bias * outputs)
        dense = self.dense(inputs, outputs)
        saved = weight or (self.widens and shape.quantized == "none")
        cast = weight and shape.float8 and shape.compiled and fits_float8(outputs, inputs)
        if cast and not name.startswith("attention"):
            saved = False  # a compiler makes what is cast again from what is kept before it
        result = count * inputs if cast and name.endswith("o_proj") else 0  # as cast, beside attention's own
        return self.tape.operation(
            [x],
            count * outputs * shape.bytes,
            saves=[x] if saved else [],
            extra=result,
            weight=True,
            trained=made,
            temporary=dense,
            back=dense,
            product=True,
        )


def scratch_bytes(products: Iterable[tuple[int, int, int]]) -> int:
    """What `ops.product` keeps on processors that multiply bfloat16 in float32: for each of its three
    buffers, the largest that any of the products [m, k] x [k, n] needs."""
    most = {"left": 0, "right": 0, "result": 0}
    for m, k, n in products:
        if min(m, k, n) < _LEAST:
            continue
        longest = max(m, k, n)
        size = min(longest, max(_LEAST, _PANEL // sorted((m, k, n))[1]))
        if k == longest:
            needed = {"left": m * size, "right": size * n, "result": m * n}
        elif m == longest:
            needed = {"left": size * k, "right": k * n, "result": size * n}
        else:
            needed = {"left": m * k, "right": k * size, "result": m * size}
        for name, numbers in needed.items():
            if numbers <= 4 * _PANEL:
                most[name] = max(most[name], numbers)
    return 4 * sum(most.values())
