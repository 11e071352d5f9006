"""What serving a model takes: memory of weights and cache, the largest batch, tokens per second.

Two rooflines: a product takes as long as its FLOPs or its bytes, whichever is longer, once for the weights
and once for the attention of the cache, which run after each other. With the peaks of a device these are
upper bounds of speed; give what its kernels reach for an estimate. Nothing here knows of queues: requests are
there, of equal length, as in an engine that keeps its batch full.

S. Williams et al., Roofline, CACM 52(4), 2009; R. Pope et al., Efficiently scaling transformer inference,
arXiv 2211.05102; T. Dettmers et al., QLoRA, arXiv 2305.14314 (the constants of 4 bits).
"""

from dataclasses import dataclass

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.plan.blocks import attended, block_products, layer_kinds, weights_of
from ropewalk.plan.hardware import PRECISIONS
from ropewalk.plan.inputs import at_least, one_of, positive, share, whole
from ropewalk.plan.sizes import end_weights, parameters

WEIGHT_BITS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "float16": 16.0,
    "float8": 8.0,  # one scale a matrix
    "int8": 8 + 16 / 128,  # a float16 scale for 128 weights
    "q8_0": 8 + 16 / 32,  # GGUF: a float16 scale for 32
    "int4": 4 + (16 + 4) / 128,  # GPTQ, AWQ: and a zero of 4 bits
    "q4_0": 4 + 16 / 32,
    "nf4": 4 + 32 / 64,  # QLoRA: a float32 constant for 64
    "nf4-double": 4 + 8 / 64 + 32 / (64 * 256),  # whose constants are in 8 bits, for 256 of them a float32
}
"""Bits of a weight in a block's matrices, constants included. All others stay in 16 (or 32)."""
CACHE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0}
"""Bytes of a number in the cache. int8 has a float16 scale for each head and token beside it."""
ACTIVATION_BYTES = 2.0
CHUNK = 8_192
"""Tokens of prompts that an engine works on at once."""


@dataclass(frozen=True)
class Machine:
    """Plain numbers of one device: bytes, bytes/s, FLOP/s. UserError where one is not above 0."""

    memory: float
    bandwidth: float
    flops: float
    link: float = 0.0
    """bytes/s to the others, one way; needed from two devices on"""
    latency: float = 0.0
    """seconds of a message to them"""
    usable: float = 0.9
    """share of the memory that the engine may take"""

    def __post_init__(self) -> None:
        positive(memory=self.memory, bandwidth=self.bandwidth, flops=self.flops)
        at_least(0.0, link=self.link, latency=self.latency)
        share(usable=self.usable)


@dataclass(frozen=True)
class Serving:
    """Of one replica on `devices`: bytes per device, seconds, tokens per second of all its requests."""

    devices: int
    context: int
    prompt: int
    batch: int
    """requests at once, each of `context` tokens"""
    largest_batch: int
    weight_bytes: float
    request_bytes: float
    """cache of one request at `context`"""
    work_bytes: float
    free_bytes: float
    """of what is usable, at this batch"""
    first_token: float
    """seconds until the first token of a `prompt` alone"""
    between_tokens: float
    """seconds of a decode step"""
    prefill_rate: float
    decode_rate: float
    bound: str
    """what a decode step waits for: memory, arithmetic or the link"""

    def lines(self) -> list[str]:
        cache = self.request_bytes * self.batch
        each = f"{self.decode_rate / self.devices:,.0f} a device"
        return [
            f"memory per device: weights {_size(self.weight_bytes)}, cache {_size(cache)} "
            f"({_size(self.request_bytes)} a request of {self.context:,} tokens), "
            f"activations {_size(self.work_bytes)}, {_size(self.free_bytes)} left",
            f"batch {self.batch:,}, {self.largest_batch:,} at most",
            f"first token of {self.prompt:,} after {self.first_token * 1e3:,.1f} ms, "
            f"prompts at {self.prefill_rate:,.0f} tokens/s",
            f"then a token every {self.between_tokens * 1e3:,.2f} ms, "
            f"{self.decode_rate:,.0f} tokens/s ({each}), bound by {self.bound}",
        ]


def cache_bytes(config: ModelConfig, tokens: int, kind: str = "bfloat16", tensor: int = 1) -> float:
    """Bytes per device of the keys and values of one request of so many tokens.

    A sliding layer holds its window (as engines with a hybrid cache do; ropewalk's own holds all). Under
    `tensor` each device has its share of the heads, and never less than one: more devices than heads hold
    copies.
    """
    positive(tokens=tokens)
    number = one_of("type of cache", PRECISIONS.get(kind, kind), CACHE_BYTES)
    per_head = config.head_dim * number + (2.0 if kind == "int8" else 0.0)
    _check_degree(config, tensor)
    heads = max(1, config.num_key_value_heads // tensor)
    return _held(config, tokens) * 2 * heads * per_head


def weight_bytes(config: ModelConfig, quantization: str = "bfloat16", tensor: int = 1) -> float:
    """Bytes per device of all weights, the matrices of blocks quantized."""
    bits = one_of("quantization", PRECISIONS.get(quantization, quantization), WEIGHT_BITS)
    _check_degree(config, tensor)
    ends = end_weights(config)
    small = parameters(config) - ends - _matrices(config)  # norms and biases, which each device has
    return _matrices(config, tensor) * bits / 8 + (ends / tensor + small) * max(bits, 16.0) / 8


def serving(
    config: ModelConfig,
    machine: Machine,
    context: int,
    prompt: int | None = None,
    batch: int | None = None,
    quantization: str = "bfloat16",
    cache: str = "bfloat16",
    tensor: int = 1,
) -> Serving:
    """Plans one replica over `tensor` devices, for requests of `context` tokens of which `prompt` come first.

    `prompt`: half of the context if None; `batch`: the largest. UserError where the weights, or so many
    requests, have no room: the message says how much is missing.
    """
    quantization, cache = PRECISIONS.get(quantization, quantization), PRECISIONS.get(cache, cache)
    prompt = max(1, context // 2) if prompt is None else prompt
    whole(context=context, prompt=prompt, batch=1 if batch is None else batch)
    if prompt > context:
        raise UserError(f"prompt is {prompt:,}; it is a part of the context, {context:,} tokens")
    if config.position == "learned" and context > config.max_position_embeddings:
        raise UserError(f"context is {context:,}; the model has {config.max_position_embeddings:,} positions")
    weights = weight_bytes(config, quantization, tensor)
    if tensor > 1 and not machine.link:
        raise UserError(f"tensor is {tensor}; the machine needs the link's bytes/s then")
    request = cache_bytes(config, context, cache, tensor)
    room = machine.memory * machine.usable
    fixed = weights + _work(config, min(context, CHUNK), tensor)
    # a request also needs its row of logits, in float32
    each = request + 4.0 * config.vocab_size / tensor
    largest = max(0, int((room - fixed) // each))
    wanted = largest if batch is None else batch
    if wanted > largest or not largest:
        missing = _size(fixed + max(wanted, 1) * each - room)
        what = f"{max(wanted, 1):,} request{'s' if wanted > 1 else ''} of {context:,} tokens"
        raise UserError(
            f"{what} lack {missing} per device: weights {_size(weights)}, cache {_size(request)} each, "
            f"{_size(room)} usable; quantize, shorten, or spread over more devices"
        )
    times = _decode(config, machine, context, wanted, quantization, cache, tensor)
    step = sum(times.values())
    first = _prefill(config, machine, prompt, quantization, tensor)
    return Serving(
        devices=tensor,
        context=context,
        prompt=prompt,
        batch=wanted,
        largest_batch=largest,
        weight_bytes=weights,
        request_bytes=request,
        work_bytes=fixed - weights + wanted * (each - request),
        free_bytes=room - fixed - wanted * each,
        first_token=first,
        between_tokens=step,
        prefill_rate=prompt / first,
        decode_rate=wanted / step,
        bound=max(times, key=lambda name: times[name]),
    )


def _decode(
    config: ModelConfig,
    machine: Machine,
    context: int,
    batch: int,
    quantization: str,
    cache: str,
    tensor: int,
) -> dict[str, float]:
    """Seconds of a step in which each of `batch` requests gets a token, by what they are spent on."""
    read, flops = _products(config, batch, batch, quantization, tensor)
    heads = config.num_attention_heads / tensor
    pairs = 4.0 * batch * _held(config, context) * heads * config.head_dim
    times = {"memory": 0.0, "arithmetic": 0.0}
    cached = batch * cache_bytes(config, context, cache, tensor)
    for moved, computed in ((read, flops), (cached, pairs)):
        slow, busy = moved / machine.bandwidth, computed / machine.flops
        times["memory" if slow >= busy else "arithmetic"] += max(slow, busy)
    times["the link"] = _reduce(config, machine, batch, tensor)
    return times


def _prefill(config: ModelConfig, machine: Machine, prompt: int, quantization: str, tensor: int) -> float:
    """Seconds until a prompt's first token, nothing else going on."""
    read, flops = _products(config, prompt, 1, quantization, tensor)
    pairs = sum(
        count * attended(prompt, window, None, fused=True) for _, window, count in layer_kinds(config)
    )
    attention = 4.0 * pairs * config.num_attention_heads / tensor * config.head_dim
    products = max(flops / machine.flops, read / machine.bandwidth)
    return products + attention / machine.flops + _reduce(config, machine, prompt, tensor)


def _products(
    config: ModelConfig, tokens: int, scored: int, quantization: str, tensor: int
) -> tuple[float, float]:
    """Bytes of weights that are read for so many tokens, and FLOPs; `scored`: of those that meet the head."""
    number, head = WEIGHT_BITS[quantization] / 8, config.vocab_size * config.hidden_size / tensor
    read = number * _matrices(config, tensor, _met(config, tokens)) + max(number, 2.0) * head
    active = _matrices(config, tensor, config.num_experts_per_tok)
    return read, 2.0 * (tokens * active + scored * head)


def _reduce(config: ModelConfig, machine: Machine, tokens: int, tensor: int) -> float:
    """Seconds of the two ring all-reduces of each layer: 2 (t-1) messages of a t-th of the activations."""
    if tensor == 1:
        return 0.0
    size = tokens * config.hidden_size * ACTIVATION_BYTES
    one = 2 * (tensor - 1) * (machine.latency + size / tensor / machine.link)
    return 2 * config.num_hidden_layers * one


def _held(config: ModelConfig, tokens: int) -> int:
    """Tokens that the layers hold, summed over them."""
    return sum(count * min(tokens, window or tokens) for _, window, count in layer_kinds(config))


def _check_degree(config: ModelConfig, tensor: int) -> None:
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    whole(tensor=tensor)
    if heads % tensor or (kv % tensor and tensor % kv):
        raise UserError(f"tensor is {tensor}; {heads} heads and {kv} key-value heads cannot be divided so")


def _matrices(config: ModelConfig, tensor: int = 1, experts: float | None = None) -> float:
    """Weights per device of the matrices of all blocks, with so many of their experts if they have any."""
    return sum(
        count * weights_of(block_products(config, moe, tensor=tensor, experts=experts))
        for moe, _, count in layer_kinds(config)
    )


def _met(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that a batch meets on average, if it is spread evenly: E (1 - (1 - k/E)^tokens)."""
    if not config.num_experts:
        return 0.0
    missed = 1.0 - config.num_experts_per_tok / config.num_experts
    return float(config.num_experts * (1.0 - missed**tokens))


def _work(config: ModelConfig, tokens: int, tensor: int) -> float:
    """Bytes of activations while so many tokens of prompts pass a layer: residual, norm and the widest."""
    experts = config.num_experts_per_tok * config.moe_intermediate_size
    inner = 2 * max(config.intermediate_size, experts) / tensor
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim / tensor
    return tokens * ACTIVATION_BYTES * (2 * config.hidden_size + max(inner, heads))


def _size(count: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,.0f} bytes"
