"""Device memory of this project's own training step, counted term by term and exact per tensor.

The peak is looked for at the moments of a step where it can be: in the forward pass, in the loss, in the
backward pass of each block and of the embedding, and in the update. What a block takes is `block_memory`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ropewalk.ops.head import _CHUNK_BYTES, _CPU_BLOCK, _DEVICE_CHUNK_BYTES, SEVERAL
from ropewalk.ops.native import library
from ropewalk.ops.product import float32_is_faster
from ropewalk.plan.block_memory import BlockMemory, Mode, block_memory, block_shape, modes_of
from ropewalk.plan.layer_memory import Shape, scratch_bytes
from ropewalk.plan.sharded_memory import Sharding
from ropewalk.plan.tape import Arrival
from ropewalk.plan.update_memory import Held, held, piece_bytes, update_peak
from ropewalk.plan.weights import Parameter, parameters, part_of
from ropewalk.plan.work import Work


@dataclass(frozen=True)
class Memory:
    """Bytes of the process of a run that needs most."""

    terms: dict[str, int]
    """each thing on the device at its largest, by name; not all are so at once"""
    moments: dict[str, int]
    """the most at each moment of a step"""
    host: dict[str, int]
    """what is kept in the host's memory instead, by name"""

    @property
    def moment(self) -> str:
        """When the most is needed."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def total_bytes(self) -> int:
        """The most that is needed on the device at once."""
        return self.moments[self.moment]


def step_memory(work: Work) -> Memory:
    """The memory of one process of this work; what a kernel of the device takes for itself is not in it."""
    step = _Step(work)
    moments = {
        "forward": step.forward(),
        "loss": step.loss(),
        "backward": step.backward(),
        "update": step.update(),
    }
    return Memory({name: size for name, size in step.terms().items() if size}, moments, step.host())


class _Step:
    """The pieces of one step, and what is there at its moments."""

    def __init__(self, work: Work) -> None:
        self.work, config = work, work.config
        self.bytes = work.parameter_bytes
        self.parameters = parameters(work)
        self.all = tuple(self.parameters)
        self.weights = self._weights()
        self.tokens = work.own_tokens
        self.sharding = Sharding(work, self.parameters)
        self.held = held(work, self.all)
        self.arrival, self.before = _arrival(work, self.held)
        first = any(p.trained and p.name.startswith("embed") for p in self.parameters.outside)
        self.needs = list(
            accumulate((self._trains(block) for block in self.parameters.blocks), initial=first, func=max)
        )
        """whether the input of each block, and of the last norm, needs a gradient"""
        self.shapes = self._shapes()
        self.modes = modes_of(work, self.shapes)
        kinds = {(id(s), mode): (s, mode) for s, mode in zip(self.shapes, self.modes, strict=True)}
        found = {key: block_memory(*kind) for key, kind in kinds.items()}
        self.blocks = [found[id(s), mode] for s, mode in zip(self.shapes, self.modes, strict=True)]
        self.offloads = work.activation_offload and work.device == "cuda"
        self.kept = [self._kept(block, mode) for block, mode in zip(self.blocks, self.modes, strict=True)]
        self.hidden = self.tokens * config.hidden_size * self.bytes
        """hidden states of all tokens"""
        self.outside = self.hidden // work.layout.tensor
        """those that a process has between the matrices"""

    def _shapes(self) -> list[Shape]:
        """Of each block; equal ones are one object."""
        known: dict[tuple[int, bool, int | None], Shape] = {}
        shapes = []
        for layer, block in enumerate(self.parameters.blocks):
            key = id(block), self.needs[layer], self.work.config.window(layer)
            if key not in known:
                known[key] = block_shape(self.work, layer, block, self.needs[layer], self.arrival)
            shapes.append(known[key])
        return shapes

    def _trains(self, block: tuple[Parameter, ...]) -> bool:
        return self.work.method in ("prompt", "prefix") or any(p.trained for p in block)

    def _kept(self, block: BlockMemory, mode: Mode) -> int:
        return 0 if self.offloads and mode == "full" else block.kept

    # what is there all the time

    def _weights(self) -> dict[str, int]:
        found = {"weights trained": 0, "weights frozen": 0, "quantized codes": 0, "quantized constants": 0}
        for p in self.all:
            numbers = part_of(p, self.work.layout) * p.count
            if p.quantized != "none":
                shared = self.work.layout.shard > 1  # else fully_shard leaves it whole
                codes, constants = p.quantized_bytes(part_of(p, self.work.layout) if shared else None)
                found["quantized codes"] += codes * p.count
                found["quantized constants"] += constants * p.count
            else:
                found["weights trained" if p.trained else "weights frozen"] += numbers * self.bytes
        return found

    def inputs(self) -> int:
        """Token ids, labels, positions and documents: on a GPU only what the micro-batch's model sees."""
        if self.work.device == "cuda":
            return 24 * self.tokens
        return 32 * self.work.micro_batch_size * self.work.accumulation * self.work.sequence_length

    def tables(self) -> int:
        """Cosines and sines of positions, and masks of sliding windows."""
        config, size = self.work.config, 0
        if config.position == "rope":
            pairs = int(config.head_dim * config.partial_rotary_factor) // 2
            size = 2 * self.tokens * pairs * self.bytes * (1 + (config.rope_local_theta is not None))
        windows = {shape.window for shape in self.shapes if shape.window is not None}
        for window in windows if self.work.device == "cpu" and self.work.layout.context == 1 else ():
            size += _band_bytes(min(self.shapes[0].document, self.shapes[0].tokens), window) * self.bytes
        return size

    def buffers(self) -> int:
        """What operations keep for the next: on a CPU a quantized weight's values; low-bit states' tables."""
        size = 0
        if self.work.quantize != "none" and self.work.device == "cpu":
            size += max(p.size for p in self.all if p.quantized != "none") * self.bytes
        if self.work.state_bits < 32:
            size += 2 * 5 * 65536
        if self.work.device == "cpu" and self.bytes == 2 and float32_is_faster():
            size += scratch_bytes(self._products())
        return size

    def _products(self) -> Iterator[tuple[int, int, int]]:
        """Sizes of all matrix products with a weight, forward and for both gradients."""
        rows, vocabulary = self._chunk()
        shapes = {(self.tokens, *p.shape) for p in self.all if p.name.endswith("_proj.weight")}
        shapes.add((rows, vocabulary, self.work.config.hidden_size))
        for count, outputs, inputs in shapes:
            yield count, inputs, outputs
            yield count, outputs, inputs
            yield outputs, count, inputs

    @cached_property
    def base(self) -> int:
        """What is there throughout forward and backward."""
        lasting = self.held.states + self.held.masters + sum(self.weights.values())
        before = self.sharding.before() if self.sharding.adds_whole else self.before
        return lasting + before + self.inputs() + self.tables() + self.buffers()

    # the moments

    def forward(self) -> int:
        """The most in the forward pass of a block: what those before it left, and its own."""
        left, most = 0, 2 * self.outside if self.work.config.scale_embeddings else self.outside
        for block, kept in zip(self.blocks, self.kept, strict=True):
            most = max(most, left + block.forward)
            left += kept
        return self.base + self.sharding.gathered("forward") + most + self._in_flight()

    def loss(self) -> int:
        kept = sum(self.kept) + self._last_norm() + self.hidden
        made = self._loss()
        most = max(made["loss chunk"], self._head_arrives())
        return self.base + self.sharding.gathered("loss") + kept + most + made["loss gradients"]

    def _last_norm(self) -> int:
        """What the last norm keeps."""
        return self.outside + self.outside // self.work.config.hidden_size if self.needs[-1] else 0

    def _head(self) -> int:
        """The gradient of the output head's weight."""
        name = "embed.weight" if self.work.config.tie_word_embeddings else "head.weight"
        return next(p.size * self.bytes * p.trained for p in self.parameters.outside if p.name == name)

    def _scored(self) -> int:
        return max(1, round(self.tokens * self.work.scored))

    def _chunk(self) -> tuple[int, int]:
        """Rows and columns of the logits held at once."""
        vocabulary = -(-self.work.config.vocab_size // self.work.layout.tensor)
        most = _CHUNK_BYTES if self.work.device == "cpu" else _DEVICE_CHUNK_BYTES
        fitting = most // (vocabulary * self.bytes)
        if fitting > 128:
            fitting -= fitting % 128
        return max(1, min(self.work.loss_chunk, fitting, self._scored())), vocabulary

    def _loss(self) -> dict[str, int]:
        """A chunk of logits with what its softmax takes; and the gradients made beside it."""
        work, config = self.work, self.work.config
        scored = self._scored()
        rows, vocabulary = self._chunk()
        chunk = rows * vocabulary * self.bytes
        capped, divided = config.final_logit_softcapping is not None, work.layout.tensor > 1
        if divided or (work.device == "cpu" and (capped or library() is None)):
            block = min(rows, max(1, (_CPU_BLOCK if work.device == "cpu" else 1 << 24) // vocabulary))
            copies = 3 if capped else 2 if self.bytes == 2 else 1
            chunk += copies * 4 * block * vocabulary
        if self.bytes == 2 and scored > SEVERAL * rows:
            chunk += self._head()  # sums of some chunks
        if scored < self.tokens:
            chunk += rows * config.hidden_size * self.bytes + 16 * scored
        gradients = self.hidden * self.needs[-1] + self._head()
        return {"loss chunk": chunk + 4 * scored, "loss gradients": gradients}

    def backward(self) -> int:
        """The most in the backward pass, from the last norm through the blocks to the embedding."""
        head, sharding = self._head(), self.sharding
        base = self.base + sharding.gathered("backward") + self._in_flight()
        if not self.needs[-1]:
            return base + head
        wide = 2 * self.outside if self.bytes == 2 and self.work.device == "cpu" else 0
        left = sum(self.kept)
        most = left + self._last_norm() + 2 * self.outside + wide + head
        if self._tied():
            pending = head
        else:
            pending = {"keep": head, "widen": head, "add": 0}[self.arrival]
        sent = 0
        for layer in reversed(range(len(self.blocks))):
            block, parts = self.blocks[layer], self.parameters.blocks[layer]
            left -= self.kept[layer]
            arriving = sharding.arriving() if layer else 0
            most = max(most, left + pending + arriving + sent + block.backward)
            if sharding.divided:
                most = max(most, left + pending + arriving + sharding.dividing(parts) + self.outside)
            pending += sharding.arrived(parts) if sharding.divided else block.gradients
            sent = sharding.sent(parts)
        most = max(most, self._embedding(pending + sent))
        if sharding.divided:  # at last those of what is outside the blocks
            outside = self.parameters.outside
            whole = sharding.sent(outside)
            most = max(most, pending + sent + whole + whole * self.bytes // 4 + sharding.arrived(outside))
        return base + most

    def _head_arrives(self) -> int:
        """What the coming of the head's gradient takes beside it: one in float32 in the place of what is
        there, or a piece's update. (A tied one waits for the embedding's.)"""
        head = next((p for p in self.parameters.outside if p.name == "head.weight"), None)
        if head is None or not head.trained or self.sharding.divided:
            return 0
        if self.work.in_backward:
            return piece_bytes(self.work, head)
        return 4 * head.size if self.arrival == "widen" else 0

    def _tied(self) -> bool:
        return self.work.config.tie_word_embeddings

    def _embedding(self, there: int) -> int:
        """The backward pass of the embeddings, after all gradients of the blocks."""
        whole = sum(
            p.size * self.bytes for p in self.parameters.outside if p.trained and p.name.startswith("embed")
        )
        if self.work.config.scale_embeddings and self.needs[0]:
            return there + max(2 * self.outside, self.outside + whole)
        return there + self.outside * self.needs[0] + whole

    def update(self) -> int:
        """Gradients are all there; activations are gone."""
        lasting = self.held.states + self.held.masters + sum(self.weights.values())
        buffers = self.inputs() + self.buffers()
        return lasting + buffers + update_peak(self.work, self.held)

    def _in_flight(self) -> int:
        """Inputs of blocks on their way to the host and back."""
        return 2 * self.outside if self.offloads and "full" in self.modes else 0

    # what is said of them

    def terms(self) -> dict[str, int]:
        """Each thing at its largest."""
        work_area = max(block.recomputed for block in self.blocks)
        transient = max(
            max(block.backward - block.kept - block.recomputed for block in self.blocks),
            max(block.forward for block in self.blocks),
        )
        return {
            **self.weights,
            "gradients": self.held.gradients,
            "optimizer states": self.held.states,
            "masters": self.held.masters,
            "activations": sum(self.kept) + self._last_norm(),
            "recomputed block": work_area,
            "block at work": transient,
            **self._loss(),
            "inputs": self.inputs(),
            "tables": self.tables(),
            "gathered weights": self.sharding.gathered("forward"),
            "gradients sent": max(map(self.sharding.sent, self.parameters.blocks)),
            "buffers": self.buffers(),
        }

    def host(self) -> dict[str, int]:
        """What the host keeps for a GPU."""
        found = dict(self.held.host)
        if self.offloads:
            full = [b.kept for b, mode in zip(self.blocks, self.modes, strict=True) if mode == "full"]
            found["activations"] = sum(full)
        return found


def _arrival(work: Work, held: Held) -> tuple[Arrival, int]:
    """What becomes of a gradient in the micro-batch that takes most; and gradients that were there before."""
    if work.in_backward or held.host:  # used up, or on its way to the host
        return "add", 0
    if work.accumulation == 1:
        return "keep", 0
    adds = work.parameter_bytes == 4 or work.accumulation > 2
    before = held.gradients if adds else held.gradients // 2
    if work.layout.processes > 1:  # whole ones come, parts are added
        return "keep", before
    return "add" if adds else "widen", before


def _band_bytes(length: int, window: int) -> int:
    """Numbers in the masks of a row of documents of that length."""
    if window >= length:
        return 0
    block = min(max(window, 128), 1024)
    places = set()
    for start in range(0, length, block):
        stop, first = min(start + block, length), max(0, start - window + 1)
        places.add((stop - start, stop - first))
    return sum(queries * keys for queries, keys in places)
