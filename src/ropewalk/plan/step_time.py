"""Seconds of one optimizer step, phase by phase, of a model in a layout on a cluster.

The step is taken apart into what a device really does: products on a roofline (`kernels`), attention fused or
written out, elementwise traffic, what is recomputed, collectives, and the schedule of the pipeline. What of
the collectives can hide behind products is stated where each is counted; the rest is on the clock.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from ropewalk.plan.blocks import Product, attended, block_products, layer_kinds, weights_of
from ropewalk.plan.hardware import Cluster
from ropewalk.plan.kernels import Kernels
from ropewalk.plan.pipeline_schedule import step_seconds
from ropewalk.plan.traffic import block_exchanges
from ropewalk.plan.weights import LOW_RANK, parameters
from ropewalk.plan.wires import collective
from ropewalk.plan.work import Work

HIDDEN = 0.9
"""Share of the products' time behind which a collective can hide: not behind the first and the last block."""
CONTENTION = 0.5
"""Of a hidden collective's time, what it takes from the products beside it: memory, power,
multiprocessors."""
SCHEDULES = {
    "gpipe": "gpipe",
    "1f1b": "1f1b",
    "interleaved-1f1b": "1f1b",
    "interleaved-zb": "zb_h1",
    "zbv": "zbv",
}
"""A layout's schedule -> that of `pipeline_schedule`."""
CODE_BYTES = {"nf4": 0.52, "int8": 1.0}
"""Of a quantized weight, for each number."""
SENDING, SENDING_ADAPTED, SENDING_QUANTIZED = 0.5e-3, 0.35e-3, 0.55e-3
"""Seconds in which the host sends a GPU one pass through a block that is not compiled; what adapters on its
products, and quantized weights, add: of tiny blocks on a Xeon of 2023, whose time is that of calling."""
WAITING = "waiting for the host"
STATE_BYTES = {"adamw": 28, "lion": 20, "muon": 20, "adafactor": 20}
"""Read and written by an update for each parameter: gradient, master, states, the 16-bit weight."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them; their sum is the step."""

    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block, or of several, for one micro-batch on one device."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    recomputed: float = 0.0
    exchanged: float = 0.0
    """collectives between products, forward"""
    exchanged_back: float = 0.0
    """the same backward, with those of what is recomputed"""

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient + self.recomputed

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exchanged + self.exchanged_back

    def times(self, count: float) -> "BlockTime":
        return BlockTime(*(value * count for value in vars(self).values()))

    def __add__(self, other: "BlockTime") -> "BlockTime":
        return BlockTime(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def products_of(work: Work, moe: bool) -> list[Product]:
    """The products of a block's forward on one device of the work."""
    config, layout = work.config, work.layout
    here = config.num_experts / layout.expert
    return block_products(config, moe, work.own_tokens, layout.tensor, here)


@dataclass(frozen=True)
class Trained:
    """What of a model the backward pass has to do with, where some of it is frozen or has no adapter."""

    share: float = 1.0
    """of the weights of blocks, or of the adapters that all linear layers would have"""
    reached: float = 1.0
    """of the blocks: below the first that is trained nothing is differentiated"""
    head: bool = True
    numbers: float = 0.0
    """of all that is trained, one process of a tensor group; counted where something is left out"""


def trained(work: Work) -> Trained:
    """By the recipe's `adapt.freeze` and `adapt.targets`."""
    return _partly(work) if work.freeze or work.targets != "all-linear" else Trained()


@lru_cache(maxsize=1024)
def _partly(work: Work) -> Trained:
    found = parameters(work)
    whole = parameters(replace(work, targets="all-linear", freeze=()))
    mine, most = (
        sum(p.size * p.count for block in kind.blocks for p in block if p.trained) for kind in (found, whole)
    )
    ends = [p for p in found.outside if p.trained]
    embeds = any(p.name.startswith("embed") for p in ends)
    tied = work.config.tie_word_embeddings
    head = embeds if tied else any(p.name.startswith("head") for p in ends)
    layers = [i for i, block in enumerate(found.blocks) if any(p.trained for p in block)]
    first = 0 if embeds else min(layers, default=len(found.blocks))
    numbers = mine + sum(p.size * p.count for p in ends)
    return Trained(mine / most if most else 0.0, 1 - first / len(found.blocks), head, numbers)


def block_time(work: Work, kernels: Kernels, moe: bool, window: int | None) -> BlockTime:
    """One block that is not recomputed, without what it sends. Products are divided by the tensor degree,
    tokens by the context degree."""
    config, t = work.config, work.layout.tensor
    products = products_of(work, moe)
    forward = sum(kernels.product(m, n, k, c) for m, n, k, c in products)
    to_inputs = sum(kernels.product(m, k, n, c) for m, n, k, c in products)
    to_weights = 0.0
    if work.method == "full":
        to_weights = trained(work).share * sum(kernels.product(k, n, m, c) for m, n, k, c in products)
    elif work.method in LOW_RANK:
        r = work.rank
        low = sum(kernels.product(m, r, k, c) + kernels.product(m, n, r, c) for m, n, k, c in products)
        low *= trained(work).share
        forward, to_inputs, to_weights = forward + low, to_inputs + low, low
    if work.quantize != "none":
        unpacked = _unpacked(work.quantize, weights_of(products), kernels)
        forward, to_inputs = forward + unpacked, to_inputs + unpacked
    gates = 2 if config.mlp_gated else 1
    rows, _, wide, count = products[-1]
    active = rows * wide * count  # inside the MLP
    near = work.own_tokens * config.hidden_size / (t if work.sequence_parallel else 1)
    turned = (
        2 * work.own_tokens * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim / t
    )
    rotary = kernels.moved(turned, 2) if config.position == "rope" else 0.0
    # values read and written: norms 2 each forward and 3 backward, residuals 3 each, the activation its own
    apart = kernels.moved(10 * near, 4) + kernels.moved((1 + gates) * active) + rotary
    apart_back = kernels.moved(12 * near, 4) + kernels.moved((1 + 2 * gates) * active) + rotary
    core, core_back = _attention(work, kernels, window)
    back = trained(work).reached * (to_inputs + apart_back + core_back)
    return BlockTime(forward + apart + core, back, to_weights)


def _unpacked(kind: str, weights: float, kernels: Kernels) -> float:
    """Seconds of dequantizing: as measured, or what is read and written (half a byte or one, and two)."""
    rate = (kernels.device.unpack or {}).get(kind)
    return weights / rate if rate else kernels.copied((CODE_BYTES[kind] + 2) * weights)


def _recomputed(
    work: Work, kernels: Kernels, block: BlockTime, sent: float, moe: bool, window: int | None
) -> BlockTime:
    """The same with what the recipe's checkpointing does once more, on average over the blocks; `sent`:
    seconds of what is sent then."""
    share = work.recomputed_share
    if work.checkpointing == "full" or work.checkpointing_budget is not None:
        return block + BlockTime(recomputed=share * block.forward, exchanged_back=share * sent)
    if work.checkpointing == "selective" and not work.fused_attention:
        return block + BlockTime(recomputed=share * _attention(work, kernels, window)[0])
    if work.checkpointing == "selective":
        products = products_of(work, moe)
        kept = _attention(work, kernels, window)[0] + sum(kernels.product(*one) for one in products)
        kept -= (len(products) + 1) * kernels.device.launch  # each is asked for, and given what was kept
        return block + BlockTime(
            recomputed=share * max(0.0, block.forward - kept), exchanged_back=share * sent
        )
    return block


def _attention(work: Work, kernels: Kernels, window: int | None) -> tuple[float, float]:
    """Seconds forward and backward."""
    s, heads = work.sequence_length, work.config.num_attention_heads / work.layout.tensor
    d, rows = work.config.head_dim, work.micro_batch_size / work.layout.context
    if work.fused_attention:
        flops = 4 * heads * d * rows * attended(s, window, work.document_length, fused=True)
        return kernels.fused_attention(flops), kernels.fused_attention(2.5 * flops, backward=True)
    forward = kernels.product(s, s, d, heads * rows, small=True) + kernels.product(
        s, d, s, heads * rows, small=True
    )
    scores = heads * rows * s * s  # softmax reads and writes them, dropout too, with a byte of mask
    return forward + kernels.moved(4.5 * scores, 2), 2 * forward + kernels.moved(5.5 * scores, 2)


def _exchanges(work: Work, cluster: Cluster, width: int, moe: bool) -> tuple[float, float, float]:
    """Seconds of what a block sends, forward, backward, and when it is run again. Little of it can hide: the
    next product waits."""
    forward = backward = again = 0.0
    for one in block_exchanges(work, moe, width):
        operation = "all_gather" if one.operation == "ring" else one.operation
        seconds = collective(operation, one.size, cluster, one.among, one.stride)
        seconds *= CONTENTION if one.beside else 1
        forward += one.forward * seconds
        backward += one.backward * seconds
        again += one.again * seconds
    return forward, backward, again


def head_time(work: Work, kernels: Kernels) -> BlockTime:
    """The output head and the loss, on the last stage."""
    vocabulary, h = work.config.vocab_size / work.layout.tensor, work.config.hidden_size
    tokens = work.own_tokens * work.scored
    product, back = kernels.product(tokens, vocabulary, h), kernels.product(tokens, h, vocabulary)
    whole = work.method == "full" and trained(work).head
    to_weight = kernels.product(h, vocabulary, tokens) if whole else 0.0
    # values of a plain one: cast (2 + 4 bytes), softmax (4 + 4), its gradient (4 + 4 + 4), cast back (4 + 2)
    size = 4 * kernels.width if work.fused_loss else 32
    loss = kernels.copied(size * tokens * vocabulary) + 3 * kernels.device.launch
    return BlockTime(product + loss, back, to_weight)


def blocks_of(work: Work, cluster: Cluster) -> BlockTime:
    """All blocks of the model for one micro-batch, with what is recomputed."""
    kernels = Kernels(cluster.accelerator, work.precision)
    blocks = BlockTime()
    for moe, window, count in layer_kinds(work.config):
        sent, sent_back, again = _exchanges(work, cluster, kernels.width, moe)
        one = block_time(work, kernels, moe, window) + BlockTime(exchanged=sent, exchanged_back=sent_back)
        blocks += _recomputed(work, kernels, one, again, moe, window).times(count)
    return blocks


def step_time(work: Work, cluster: Cluster, blocks: BlockTime | None = None) -> StepTime:
    """Seconds of one optimizer step by phase. `blocks`: of `blocks_of`, where the caller has them."""
    kernels = Kernels(cluster.accelerator, work.precision)
    stage = (blocks or blocks_of(work, cluster)).times(1 / work.layout.pipeline)
    head, m = head_time(work, kernels), work.accumulation
    phases = {  # of the last stage, which has the head and is waited for
        "forward": m * (stage.forward + head.forward),
        "backward": m * (stage.input_gradient + stage.weight_gradient + head.backward),
        "recomputation": m * stage.recomputed,
        "exchange": m * (stage.exchanged + stage.exchanged_back),
        "pipeline": _pipeline(work, cluster, stage, kernels.width),
        "sharding": _sharding(work, cluster, stage.forward + head.forward, stage.backward + head.backward),
        "optimizer": _optimizer(work, cluster, kernels, m * stage.total),
    }
    if cluster.sends and work.device == "cuda" and not work.compile:
        phases[WAITING] = max(0.0, m * _sent(work) - m * stage.total)
    return StepTime({name: seconds for name, seconds in phases.items() if seconds})


def _sent(work: Work) -> float:
    """Seconds in which the host sends the passes of a micro-batch through the blocks of a stage."""
    each = (
        SENDING + SENDING_ADAPTED * (work.method in LOW_RANK) + SENDING_QUANTIZED * (work.quantize != "none")
    )
    return work.config.num_hidden_layers / work.layout.pipeline * each * (2 + work.recomputed_share)


def weights_here(work: Work) -> float:
    """Weights of the largest stage on one device, before they are sharded."""
    config, layout = work.config, work.layout
    blocks = sum(count * weights_of(products_of(work, moe)) for moe, _, count in layer_kinds(config))
    ends = 1 if layout.pipeline > 1 or config.tie_word_embeddings else 2
    return blocks / layout.pipeline + ends * config.vocab_size * config.hidden_size / layout.tensor


def trained_here(work: Work) -> float:
    """Those of them that get gradients; adapters as they are added."""
    if work.freeze or work.targets != "all-linear":
        return trained(work).numbers / work.layout.pipeline
    if work.method == "full":
        return weights_here(work)
    if work.method not in LOW_RANK:
        return 0.001 * weights_here(work)
    config, layout = work.config, work.layout
    low = sum(
        count * sum((n + k) * work.rank * c for _, n, k, c in products_of(work, moe))
        for moe, _, count in layer_kinds(config)
    )
    return low / layout.pipeline


def _pipeline(work: Work, cluster: Cluster, stage: BlockTime, width: int) -> float:
    """Seconds in which a pipeline's stages wait for each other. What is sent is waited for, forward and
    back."""
    layout, m = work.layout, work.accumulation
    if layout.pipeline == 1:
        return 0.0
    v = layout.stages_each
    sent = work.own_tokens * work.config.hidden_size * width / layout.tensor
    message = collective("send", sent, cluster, layout.pipeline, layout.data * layout.context * layout.tensor)
    forward = (stage.forward + stage.exchanged) / v + message
    backward = (stage.input_gradient + stage.recomputed + stage.exchanged_back) / v + message
    name = SCHEDULES[layout.pipeline_schedule]
    whole = step_seconds(name, layout.pipeline, m, v, forward, backward, stage.weight_gradient / v)
    return whole - m * stage.total


def _sharding(work: Work, cluster: Cluster, forward: float, backward: float) -> float:
    """Seconds that gathering weights and reducing gradients adds, beside the products of a micro-batch."""
    layout, m = work.layout, work.accumulation
    group, weights, trained = layout.parts, weights_here(work), trained_here(work)
    blocks = -(-work.config.num_hidden_layers // layout.pipeline)  # each is gathered and reduced by itself

    def over(operation: str, size: float, devices: int, stride: int) -> float:
        return blocks * collective(operation, size / blocks, cluster, devices, stride)

    seconds = 0.0
    if group > 1:
        width = CODE_BYTES.get(work.quantize, 4 if work.precision == "float32" else 2)
        gathered = over("all_gather", weights * width, group, layout.tensor)
        reduced = over("reduce_scatter", trained * work.reduce_bytes, group, layout.tensor)
        if layout.stage == 3:
            seconds += m * (_exposed(gathered, forward) + _exposed(gathered + reduced, backward))
        else:
            again = m if layout.stage == 2 else 1
            seconds += _exposed(gathered, forward) + again * _exposed(reduced, backward)
    if layout.replicate > 1:
        reduced = over(
            "all_reduce", trained / group * work.reduce_bytes, layout.replicate, layout.tensor * group
        )
        seconds += _exposed(reduced, backward)
    return seconds


def _exposed(collective_: float, products: float) -> float:
    """Of a collective beside products, what is seen on the clock."""
    hidden = min(collective_, HIDDEN * products)
    return collective_ - hidden + CONTENTION * hidden


def _optimizer(work: Work, cluster: Cluster, kernels: Kernels, products: float) -> float:
    """The update; where states are in the host's memory, what crossing over adds to the step."""
    count = trained_here(work) / work.layout.parts
    state = STATE_BYTES[work.optimizer] * (work.state_bits / 32 if work.state_bits < 32 else 1)
    if work.offload:
        return max(0.0, 6 * count / cluster.accelerator.host - HIDDEN * products) + count * state / 20e9
    rate = cluster.accelerator.update
    return count * state / rate if rate else kernels.copied(count * state)
