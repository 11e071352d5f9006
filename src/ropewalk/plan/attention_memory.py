"""What attention takes: torch's kernels, and the formula written out; on sizes (see `tape`)."""

from dataclasses import dataclass, replace
from functools import lru_cache

from ropewalk.ops.attention_cpu import parts, possible
from ropewalk.ops.attention_kernels import SHORT
from ropewalk.ops.product import float32_is_faster
from ropewalk.plan.layer_memory import Layers
from ropewalk.plan.tape import Tape, Value

_QUERY_BLOCK = 1024  # of ops.attention


class AttentionLayers(Layers):
    """`ops.rope` and `ops.attention`."""

    @property
    def virtual(self) -> int:
        """Bytes of the virtual tokens' keys and values."""
        return 2 * self.shape.prefix * self.shape.kv_heads * self.shape.dim * self.shape.bytes

    def rope(self, x: Value) -> Value:
        """Tables are there anyway. Four half products and two sums before the result, and after it."""
        share = self.shape.rotated
        size = x.room.size
        if self.native:
            return self.tape.operation([x], size, weight=True)
        return self.tape.operation(
            [x], size, weight=True, temporary=int(size * share), back=int(size * max(0.0, 2 * share - 1))
        )

    def attend(self, q: Value, k: Value, v: Value) -> Value:
        """All documents at once, but on a CPU without a kernel for that: one by one there, and joined."""
        shape = self.shape
        alone = not shape.prefix and shape.context == 1
        if shape.device == "cpu" and shape.bytes == 2 and alone and possible():
            return self.packed(q, k, v)
        out = self.documents(q, k, v)
        if shape.device == "cuda" or shape.context > 1 or shape.document >= shape.tokens:
            return out
        return self.tape.operation([out], q.room.size, through=True)

    def documents(self, q: Value, k: Value, v: Value) -> Value:
        shape, size = self.shape, q.room.size
        length = min(shape.document, shape.tokens * shape.context)
        window = shape.window if shape.window is not None and shape.window < length + shape.prefix else None
        sums = 4 * self.count * shape.heads
        if shape.context > 1:
            return self.shared(q, k, v)
        if shape.softcap:
            return self.written_out(q, k, v, length, window)
        if window is not None and shape.device == "cpu":
            return self.windowed(q, k, v, length, window)
        back = temporary = 0
        numbers, others = size // shape.bytes, k.room.size // shape.bytes
        if shape.device == "cpu":
            if shape.prefix:  # attended to apart
                temporary = 2 * size + sums
                self.tape.keep(size + sums)
            if shape.bytes == 2 and (float32_is_faster() or (shape.prefix and length <= SHORT)):
                back = max(14 * numbers + 12 * others, 16 * numbers + 8 * others)
        elif shape.bytes == 4 and shape.heads != shape.kv_heads:
            return self.written_out(q, k, v, length, window)  # no kernel takes grouped queries in float32
        else:
            back = 4 * numbers + sums + (2 * size if shape.heads != shape.kv_heads else 0)
        return self.tape.operation(
            [q, k, v],
            size,
            saves=[q, k, v],
            saves_out=True,
            extra=sums,
            trained=self.virtual,
            temporary=temporary,
            back=back,
            product=True,
        )

    def packed(self, q: Value, k: Value, v: Value) -> Value:
        """`ops.attention_cpu`: gradients of keys and values are in float32 first, a part for some heads."""
        shape = self.shape
        share = parts(max(1, self.count // shape.document), shape.heads, shape.kv_heads)
        return self.tape.operation(
            [q, k, v],
            q.room.size,
            saves=[q, k, v],
            saves_out=True,
            extra=4 * self.count * shape.heads,
            back=2 * (k.room.size + v.room.size) * (share + (share > 1)),
            product=True,
        )

    def windowed(self, q: Value, k: Value, v: Value, length: int, window: int) -> Value:
        """Blocks of queries, each with the keys it sees; masks are the batch's."""
        block = min(max(window, 128), _QUERY_BLOCK)
        size, sums = q.room.size, 4 * self.count * self.shape.heads
        inputs = [q, k, v] if length > block or not self.shape.prefix else [q]
        if self.shape.prefix:  # the first block's keys begin with them
            inputs += [self.after(x, min(block, length), length, window) for x in (k, v)]
        pieces = self.tape.operation(
            inputs,
            size,
            saves=inputs,
            saves_out=True,
            extra=sums,
            product=True,
            back=k.room.size + v.room.size + size if length > block else 0,
        )
        return self.tape.operation([pieces], size, through=True) if length > block else pieces

    def after(self, x: Value, keys: int, length: int, window: int | None) -> Value:
        """Keys or values of each document, the first `keys` of its `length`, after the virtual tokens."""
        shape = self.shape
        before = shape.prefix if window is None else min(shape.prefix, window - 1)
        each = shape.kv_heads * shape.dim * shape.bytes
        documents = max(1, self.count // length)
        return self.tape.operation([x], documents * (before + keys) * each, trained=before * each)

    def written_out(self, q: Value, k: Value, v: Value, length: int, window: int | None) -> Value:
        """Scores of a block of queries at a time; where there is more than one block, each is made again."""
        shape = self.shape
        block = min(length, _QUERY_BLOCK if window is None else min(max(window, 128), _QUERY_BLOCK))
        scores = Scores(
            max(1, self.count // length),
            block,
            shape.prefix + length if window is None else min(shape.prefix + length, window - 1 + block),
            shape.heads,
            shape.kv_heads,
            shape.dim,
            shape.bytes,
            shape.softcap,
        )
        if length <= block:
            self.tape.most = max(self.tape.most, self.tape.alive + 11 * block * length)  # making the mask
            if shape.prefix:
                k, v = (self.after(x, length, length, window) for x in (k, v))
            return scores.run(self.tape, q, k, v)
        forward, backward = scores.apart()
        pair = k.room.size + v.room.size
        out = q.room.size
        # the inner recomputation holds what it begins from even where the block forgets it; and what
        # selective checkpointing keeps, it keeps of what is made again as well
        self.tape.capture(q, k, v)
        for start in range(0, length, block):
            stop = min(start + block, length)
            first = 0 if window is None else max(0, shape.prefix + start - window + 1)
            part = replace(scores, queries=stop - start, keys=shape.prefix + stop - first)
            self.tape.keep(part.products())
        pieces = self.tape.operation(
            [q, k, v],
            out,
            saves=[q, k, v],
            temporary=forward,
            trained=self.virtual,
            back=backward + out + pair,
        )
        return self.tape.operation([pieces], out, through=True)

    def shared(self, q: Value, k: Value, v: Value) -> Value:
        """Processes share the tokens of rows: keys and values of the whole rows come, and go again."""
        shape, size = self.shape, q.room.size
        numbers, pair = size // shape.bytes, k.room.size + v.room.size
        sums = 4 * self.count * shape.heads
        return self.tape.operation(
            [q, k, v],
            size,
            saves=[q, k, v],
            saves_out=True,
            extra=sums,
            temporary=4 * numbers + pair * (1 + 3 * shape.context),
            back=4 * numbers + pair * (1 + 3 * shape.context) + pair * 4 * shape.context // shape.bytes,
        )


@dataclass(frozen=True)
class Scores:
    """Attention by its formula: `ops.attention._softcapped` of `queries` over `keys` of some documents."""

    documents: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    bytes: int
    softcap: bool

    def run(self, tape: Tape, q: Value, k: Value, v: Value) -> Value:
        """The result, as the queries."""
        numbers = self.documents * self.heads * self.queries * self.keys
        low, wide, mask = numbers * self.bytes, numbers * 4, self.queries * self.keys
        seen = tape.room(mask)
        out = self.documents * self.queries * self.heads * self.dim * self.bytes
        folded = tape.operation([q], out)
        turned = self._laid_out(tape, k)
        scores = tape.operation([folded, turned], low, saves=[folded, turned], product=True)
        if self.softcap:
            bent = tape.operation([tape.operation([scores], low)], low, saves_out=True)
            scores = tape.operation([bent], low)
            del bent
        scores = tape.operation([scores], low, extra=mask)
        copy = tape.operation([scores], wide) if self.bytes < 4 else scores
        weights = tape.operation([copy], wide, saves_out=True)
        del copy
        if self.bytes < 4:
            weights = tape.operation([weights], low)
        values = self._laid_out(tape, v)
        result = tape.operation([weights, values], out, saves=[weights, values], product=True, back=out)
        del seen, scores
        return result

    def products(self) -> int:
        """Bytes of the results of both products."""
        queries = self.documents * self.heads * self.queries
        return queries * (self.keys + self.dim) * self.bytes

    def _laid_out(self, tape: Tape, x: Value) -> Value:
        """Keys or values of several documents are copied for a product of all of them."""
        return tape.operation([x], x.room.size) if self.documents > 1 else x

    @lru_cache(maxsize=1024)  # noqa: B019  (a frozen value is its own key)
    def apart(self) -> tuple[int, int]:
        """Most that it takes beside its inputs and its result: forward, and made again with its gradients."""
        tape = Tape()
        each = self.documents * self.dim * self.bytes
        q = tape.value(each * self.queries * self.heads, True)
        k, v = (tape.value(each * self.keys * self.kv_heads, True) for _ in range(2))
        inputs = tape.alive
        tape.most = max(tape.most, tape.alive + 11 * self.queries * self.keys)
        forward, backward = tape.twice(lambda: self.run(tape, q, k, v), 0)
        forward -= inputs + q.room.size
        return forward, max(forward, backward - inputs)
