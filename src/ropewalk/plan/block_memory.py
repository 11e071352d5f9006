"""What one block takes in a training step: kept by its forward pass, and at most in each direction.

The functions here are those of `model.layers`, `model.moe`, `adapt` and `ops`, on sizes (see `tape`). What an
operation saves is what its `save_for_backward` says, or torch's formula for its derivative.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, cast

from ropewalk.plan.attention_memory import AttentionLayers
from ropewalk.plan.layer_memory import Shape
from ropewalk.plan.tape import Arrival, Node, Part, Tape, Value
from ropewalk.plan.weights import Parameter
from ropewalk.plan.work import Work
from ropewalk.train.activations import _TILE, _within

Mode = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class BlockMemory:
    """Bytes."""

    kept: int
    """left for the backward pass, the block's input included where it is"""
    forward: int
    """most during the forward pass, with its input"""
    backward: int
    """most during the backward pass, with what was kept, the output's gradient, and those of parameters"""
    gradients: int
    """of its parameters, beyond those that were there before"""
    recomputed: int
    """what is made again before the backward pass"""


@lru_cache(maxsize=4096)
def block_memory(shape: Shape, mode: Mode) -> BlockMemory:
    """Runs a block forward and backward on sizes, keeping what `mode` of checkpointing keeps."""
    tape = Tape(shape.arrival)
    tape.forgets, tape.kept = mode != "none", [] if mode == "selective" else None
    block = Block(shape, tape)
    block.recomputed = mode != "none"
    block.tiled = mode == "full" and shape.tokens // shape.tensor > 2 * _TILE
    hidden: Value | None = tape.value(block.outside, shape.input_needs_gradient)
    assert hidden is not None
    node = block.run(hidden)
    forward = tape.most
    if node is None:
        return BlockMemory(0, forward, 0, 0, 0)
    if mode == "none":
        source, hidden = hidden.node, None  # the input is kept by what needs it
        kept = tape.most = tape.alive
        gradient = tape.room(block.outside)
    else:
        source, kept = hidden.node, tape.alive
        tape.most = kept
        gradient = tape.room(block.outside)
        tape.recompute(lambda: block.run(hidden))
    begun = tape.alive - gradient.size
    tape.backward(node, gradient)
    del gradient
    made = sum(room.size for room in tape.gradients) - tape.grown
    del source
    return BlockMemory(kept, forward, tape.most, made, begun - kept)


class Block(AttentionLayers):
    """`model.transformer.Block` on sizes."""

    recomputed = True
    """what enters a pair of matrices is gathered anew when the block runs again"""
    tiled = False
    """the MLP takes some tokens of a long row at a time"""

    def run(self, hidden: Value) -> Node | None:
        """From hidden states to what they leave for the backward pass."""
        shape, after = self.shape, self.shape.placement != "pre"
        before = shape.placement != "post"
        out = self.attention(self.norm(hidden, "attention_norm", self.apart) if before else hidden)
        if after:
            out = self.norm(out, "post_attention_norm", self.apart)
        residual = self.add(hidden, out)
        source = hidden if shape.parallel else residual
        x = self.norm(source, "mlp_norm", self.apart) if before else source
        if shape.experts:
            out = self.experts(x)
        else:
            out = self.tiles(x) if self.tiled else self.mlp_pair(x)
        if after:
            out = self.norm(out, "post_mlp_norm", self.apart)
        return self.add(residual, out).node

    def add(self, a: Value, b: Value) -> Value:
        return self.tape.operation([a, b], self.outside, through=True)

    def enter(self, x: Value) -> Value:
        """Tokens of all processes of a tensor group."""
        if self.shape.tensor == 1:
            return x
        whole = x.room.size * self.shape.tensor
        made = self.tape.operation([x], whole, temporary=0 if self.shape.rows == 1 else whole, back=whole)
        if not self.recomputed:
            made.part = Part(x.room, whole)
        return made

    def leave(self, x: Value, entered: Value) -> Value:
        """Their sums, of this process's tokens."""
        if self.shape.tensor == 1:
            return x
        out = self.tape.operation([x], self.outside, temporary=x.room.size)
        if out.node is not None:
            out.node.entered = entered.part
        return out

    def attention(self, hidden: Value) -> Value:
        shape = self.shape
        x = self.enter(hidden)
        del hidden
        width, kv_width = shape.heads * shape.dim, shape.kv_heads * shape.dim
        q = self.linear(x, "attention.q_proj", shape.hidden, width)
        k = self.linear(x, "attention.k_proj", shape.hidden, kv_width)
        v = self.linear(x, "attention.v_proj", shape.hidden, kv_width)
        if shape.qk_norm is not None:
            each = shape.qk_norm == "head"
            q = self.norm(q, "attention.q_norm", self.count * (shape.heads if each else 1))
            k = self.norm(k, "attention.k_norm", self.count * (shape.kv_heads if each else 1))
        if shape.rotated:
            q, k = self.rope(q), self.rope(k)
        out = self.attend(q, k, v)
        y = self.linear(out, "attention.o_proj", width, shape.hidden)
        return self.leave(y, x)

    def mlp_pair(self, x: Value) -> Value:
        y = self.enter(x)
        del x
        return self.leave(self.mlp(y, "mlp", self.shape.inner, self.count), y)

    def tiles(self, x: Value) -> Value:
        """Each tile is computed again in the backward pass, when nothing is kept of the others; the tiles'
        results are joined, and so are their gradients."""
        tape = Tape()
        one = Block(replace(self.shape, tokens=_TILE * self.shape.tensor), tape)
        part = tape.value(one.outside, True)
        # its input and result, and their gradients, are parts of what is there
        forward, backward = tape.twice(lambda: one.mlp_pair(part), one.outside)
        made = sum(room.size for room in tape.gradients)
        y = self.tape.operation(
            [x],
            self.outside,
            saves=[x],
            temporary=forward - 2 * one.outside,
            trained=made,
            back=max(backward - 3 * one.outside, self.outside),
        )
        return self.tape.operation([y], self.outside, through=True)

    def mlp(self, x: Value, name: str, inner: int, count: int) -> Value:
        shape = self.shape
        if not shape.gated:
            up = self.linear(x, f"{name}.up_proj", shape.hidden, inner, count)
            bent = self.bend(up)
            del up
            return self.linear(bent, f"{name}.down_proj", inner, shape.hidden, count)
        gate = self.linear(x, f"{name}.gate_proj", shape.hidden, inner, count)
        if not shape.compiled and not (self.native and shape.act in ("silu", "swish")):
            gate = self.bend(gate)  # a compiler makes it again where it is needed
        up = self.linear(x, f"{name}.up_proj", shape.hidden, inner, count)
        made = self.tape.operation([gate, up], up.room.size, saves=[gate, up])
        del gate, up
        return self.linear(made, f"{name}.down_proj", inner, shape.hidden, count)

    def bend(self, x: Value) -> Value:
        if self.shape.act == "relu":
            return self.tape.operation([x], x.room.size, saves_out=True)
        return self.tape.operation([x], x.room.size, saves=[x])

    def experts(self, x: Value) -> Value:
        """`model.moe` with an even load: each token's copies, sorted by expert."""
        shape, tape, size = self.shape, self.tape, self.shape.bytes
        pairs, numbers = self.apart * shape.chosen, self.apart * shape.experts
        router = self.plain(x, "mlp.router", shape.hidden, shape.experts, self.apart)
        probabilities = tape.operation([router], 4 * numbers, saves_out=True, temporary=4 * numbers)
        weights = tape.operation([probabilities], 4 * pairs, extra=8 * pairs)
        order = tape.room(16 * pairs)
        copies = tape.operation(
            [x], pairs * shape.hidden * size, weight=True, back=pairs * shape.hidden * size
        )
        joined = self.traded(copies, pairs) if shape.expert > 1 else self.each(copies, pairs)
        del copies
        weighted = tape.operation([joined, weights], joined.room.size, saves=[joined, weights])
        del joined, order
        return tape.operation([weighted], self.outside, weight=True, temporary=weighted.room.size)

    def each(self, rows: Value, count: int) -> Value:
        """Each expert that is here takes its share of so many rows."""
        here, outputs = self.shape.experts // self.shape.expert, []
        for i in range(here):
            share = count * (i + 1) // here - count * i // here
            outputs.append(self.mlp(Value(rows.room, rows.node), "mlp.experts.0", self.shape.inner, share))
        return self.tape.operation(outputs, rows.room.size, through=True)

    def traded(self, rows: Value, count: int) -> Value:
        """Rows go to where their experts are, and come back: `parallel.expert`."""
        size = rows.room.size
        arrived = self.tape.operation([rows], size)
        order = self.tape.operation([arrived], size, extra=8 * count)
        made = self.each(order, count)
        back = self.tape.operation([made], size, saves=[made], temporary=size)
        return self.tape.operation([back], size)


def block_shape(work: Work, layer: int, block: tuple[Parameter, ...], needs: bool, arrival: Arrival) -> Shape:
    """What decides the memory of a block. `needs`: its input needs a gradient."""
    config, layout = work.config, work.layout
    moe = layer in config.moe_layers
    adapted = (p.name.rpartition(".")[0] for p in block if p.trained and p.name.endswith(_ADAPTERS))
    virtual = work.tokens if work.method in ("prompt", "prefix") else 0
    return Shape(
        rows=work.micro_batch_size,
        tokens=work.sequence_length // layout.context,
        document=min(work.document_length or work.sequence_length, work.sequence_length),
        tensor=layout.tensor,
        context=layout.context,
        bytes=work.parameter_bytes,
        device=work.device,
        compiled=work.compile,
        float8=work.precision == "float8",
        hidden=config.hidden_size,
        inner=config.moe_intermediate_size if moe else config.intermediate_size // layout.tensor,
        heads=config.num_attention_heads // layout.tensor,
        kv_heads=max(1, config.num_key_value_heads // layout.tensor),
        dim=config.head_dim,
        rotated=config.partial_rotary_factor if config.position == "rope" else 0.0,
        norm=config.norm,
        placement=config.norm_placement,
        parallel=config.parallel_residual,
        qk_norm=config.qk_norm,
        act=config.hidden_act,
        gated=config.mlp_gated,
        window=config.window(layer),
        softcap=config.attn_logit_softcapping is not None,
        experts=config.num_experts if moe else 0,
        expert=layout.expert,
        chosen=config.num_experts_per_tok,
        input_needs_gradient=needs,
        trained=frozenset(p.name for p in block if p.trained),
        adapted=frozenset(adapted),
        method=work.method,
        rank=work.rank,
        dropout=work.dropout > 0,
        quantized=work.quantize,
        prefix=virtual,
        arrival=arrival,
    )


_ADAPTERS = (".lora_a", ".vector", ".down")


def modes_of(work: Work, shapes: list[Shape]) -> tuple[Mode, ...]:
    """What `train.activations.save_activations` chooses for each block."""
    count = len(shapes)
    if work.checkpointing_budget is None:
        every = work.checkpointing_every
        modes: list[Mode] = ["none"] * count
        modes[every - 1 :: every] = [work.checkpointing] * (count // every)
        return tuple(modes)
    return cast(tuple[Mode, ...], _within(work.checkpointing_budget, count, kept_share(shapes[0])))


def kept_share(shape: Shape) -> float:
    """`train.activations._kept_share`."""
    few, many = (_kept_bytes(shape, tokens) for tokens in (64, 128))
    everything, products = (more - less for more, less in zip(many, few, strict=True))
    return min(1.0, products / everything) if everything else 1.0


def _kept_bytes(shape: Shape, tokens: int) -> tuple[int, int]:
    alone = replace(shape, tensor=1, context=1, input_needs_gradient=True)
    small = replace(alone, rows=1, tokens=tokens, document=tokens)
    tables = int(2 * tokens * shape.dim * shape.rotated / 2) * shape.bytes
    products = block_memory(small, "selective").kept - tokens * shape.hidden * shape.bytes
    return block_memory(small, "none").kept + tables, products
