"""The serving planner against figures worked out by hand, published sizes of models, and its limits."""

from dataclasses import replace

import pytest

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.plan.serving import WEIGHT_BITS, Machine, cache_bytes, serving, weight_bytes

GIB = 2**30
H100 = Machine(memory=80 * GIB, bandwidth=3.35e12, flops=989e12, link=450e9, latency=5e-6)


def llama(
    layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int = 128_256
) -> ModelConfig:
    return ModelConfig("llama", vocabulary, hidden, inner, layers, heads, kv, hidden // heads, 8192)


LLAMA3_8B = llama(32, 4096, 14336, 32, 8)
LLAMA3_70B = llama(80, 8192, 28672, 64, 8)
LLAMA2_7B = llama(32, 4096, 11008, 32, 32, 32_000)
MISTRAL_7B = replace(
    llama(32, 4096, 14336, 32, 8, 32_000), layer_types=("sliding_attention",) * 32, sliding_window=4096
)
GPT2 = ModelConfig(
    family="gpt2",
    vocab_size=50_257,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    max_position_embeddings=1024,
    position="learned",
    norm="layer",
    mlp_gated=False,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)
QWEN3_30B = ModelConfig(
    family="qwen3_moe",
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40_960,
    qk_norm="head",
    moe_layers=tuple(range(48)),
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)


@pytest.mark.parametrize(
    ("config", "kind", "per_token"),
    [
        (LLAMA3_8B, "bfloat16", 128 * 1024),  # 32 layers x 8 heads x 128 x 2 x 2 bytes
        (LLAMA3_8B, "float16", 128 * 1024),
        (LLAMA3_8B, "float8", 64 * 1024),
        (LLAMA3_8B, "int8", 64 * 1024 + 32 * 8 * 2 * 2),  # a float16 scale per head, key and value
        (LLAMA3_70B, "bfloat16", 320 * 1024),
        (LLAMA2_7B, "bfloat16", 512 * 1024),
        (GPT2, "float32", 72 * 1024),
    ],
)
def test_a_token_in_the_cache_takes_what_the_hand_says(config, kind, per_token):
    assert cache_bytes(config, 1, kind) == per_token
    assert cache_bytes(config, 1000, kind) == 1000 * per_token


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA3_8B, 8_030_261_248),
        (LLAMA3_70B, 70_553_706_496),
        (LLAMA2_7B, 6_738_415_616),
        (GPT2, 124_439_808),
        (QWEN3_30B, 30_532_122_624),
    ],
)
def test_weights_are_as_many_as_the_checkpoints_hold(config, parameters):
    """To the last one."""
    assert weight_bytes(config) == 2 * parameters
    assert weight_bytes(config, "float32") == 4 * parameters


def test_sliding_layers_hold_their_window():
    """Mistral 7B: 512 MiB from 4,096 tokens on; where every sixth layer is full, that one goes on growing."""
    assert cache_bytes(MISTRAL_7B, 4096) == cache_bytes(MISTRAL_7B, 32_768) == 512 * 2**20
    assert cache_bytes(MISTRAL_7B, 1000) == cache_bytes(LLAMA3_8B, 1000)
    kinds = tuple("full_attention" if i % 6 == 5 else "sliding_attention" for i in range(30))
    hybrid = replace(LLAMA3_8B, num_hidden_layers=30, layer_types=kinds, sliding_window=1024)
    assert cache_bytes(hybrid, 10_000) == (25 * 1024 + 5 * 10_000) * 8 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [("int8", 8.125), ("q8_0", 8.5), ("int4", 4.15625), ("q4_0", 4.5), ("nf4", 4.5), ("nf4-double", 4.127)],
)
def test_quantized_matrices_take_their_constants_too(quantization, bits):
    """Of Llama-3-8B's weights 6.98e9 are in the blocks' matrices; the ends stay in 16 bits."""
    matrices = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    rest = 8_030_261_248 - matrices
    assert WEIGHT_BITS[quantization] == pytest.approx(bits, abs=5e-4)
    taken = weight_bytes(LLAMA3_8B, quantization)
    assert taken == pytest.approx(matrices * bits / 8 + 2 * rest, rel=1e-4)


def test_a_decode_step_alone_reads_the_weights_and_a_full_one_computes():
    """Batch 1: all but the embedding at the memory's rate. Then batch by batch towards the arithmetic's."""
    one = serving(LLAMA3_8B, H100, context=2, prompt=1, batch=1)
    read = 2 * (8_030_261_248 - 128_256 * 4096)
    assert one.between_tokens == pytest.approx(read / 3.35e12, rel=1e-4)
    assert one.decode_rate == pytest.approx(223, abs=1)
    assert one.bound == "memory"
    many = serving(LLAMA3_8B, replace(H100, memory=4e12), context=2, prompt=1, batch=5000)
    assert many.bound == "arithmetic"
    assert many.between_tokens == pytest.approx(5000 * read / 989e12, rel=0.01)
    rates = [serving(LLAMA3_8B, H100, 1024, batch=b).decode_rate for b in (1, 4, 16, 64, 256)]
    assert rates == sorted(rates)


def test_the_cache_is_read_at_every_step():
    """64 requests of 8,192 tokens: 64 GiB at 128 KiB a token, longer than the weights take."""
    machine = replace(H100, memory=160 * GIB)
    full = serving(LLAMA3_8B, machine, 8192, batch=64)
    empty = serving(LLAMA3_8B, machine, 2, prompt=1, batch=64)
    assert full.between_tokens - empty.between_tokens == pytest.approx(64 * GIB / 3.35e12, rel=1e-3)
    assert full.request_bytes == GIB
    half = serving(LLAMA3_8B, machine, 8192, batch=64, cache="float8")
    saved = full.between_tokens - half.between_tokens
    assert saved == pytest.approx(32 * GIB / 3.35e12, rel=1e-3)


def test_a_prompt_costs_two_flops_a_weight_and_its_pairs():
    """8,192 tokens through Llama-3-8B: 114.3 TFLOPs of products, 17.6 of attention, the head once."""
    plan = serving(LLAMA3_8B, H100, 8192, prompt=8191)
    matrices = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    products = 2 * 8191 * matrices + 2 * 128_256 * 4096
    attention = 32 * 4 * 4096 * 8191 * 8192 / 2
    assert plan.first_token == pytest.approx((products + attention) / 989e12, rel=1e-9)
    assert plan.prefill_rate == pytest.approx(8191 / plan.first_token)
    windowed = replace(LLAMA3_8B, layer_types=("sliding_attention",) * 32, sliding_window=1024)
    pairs = 1024 * 1025 / 2 + (8191 - 1024) * 1024
    shorter = serving(windowed, H100, 8192, prompt=8191).first_token
    assert shorter == pytest.approx((products + 32 * 4 * 4096 * pairs) / 989e12, rel=1e-9)


def test_the_largest_batch_fills_the_memory_and_one_more_does_not():
    plan = serving(LLAMA3_8B, H100, 8192)
    assert plan.batch == plan.largest_batch
    used = plan.weight_bytes + plan.batch * plan.request_bytes + plan.work_bytes
    assert used + plan.free_bytes == pytest.approx(0.9 * 80 * GIB)
    assert 0 <= plan.free_bytes < plan.request_bytes * 1.01
    assert 50 < plan.batch < 57  # (72 - 15 GiB) / 1 GiB, less the activations
    with pytest.raises(UserError, match=r"requests of 8,192 tokens lack \S+ [KMG]iB per device"):
        serving(LLAMA3_8B, H100, 8192, batch=plan.batch + 1)
    assert serving(LLAMA3_8B, H100, 8192, cache="float8").largest_batch > 1.95 * plan.batch
    assert serving(LLAMA3_8B, H100, 8192, quantization="int4").largest_batch > plan.batch + 9


def test_tensor_parallel_divides_weights_and_cache_and_pays_for_it():
    """70B in 16 bits needs two H100; over 8 each has an eighth, and a step waits for 160 all-reduces."""
    with pytest.raises(UserError, match="1 request of 4,096 tokens lack"):
        serving(LLAMA3_70B, H100, 4096)
    two, eight = (serving(LLAMA3_70B, H100, 4096, batch=8, tensor=t) for t in (2, 8))
    norms = 2 * (80 * 2 + 1) * 8192
    assert two.weight_bytes - norms == pytest.approx(4 * (eight.weight_bytes - norms))
    assert eight.request_bytes == cache_bytes(LLAMA3_70B, 4096) / 8
    assert eight.between_tokens < two.between_tokens
    free = serving(LLAMA3_70B, replace(H100, link=1e30, latency=0.0), 4096, batch=8, tensor=8)
    waited = 160 * 14 * (5e-6 + 8 * 8192 * 2 / 8 / 450e9)
    assert eight.between_tokens - free.between_tokens == pytest.approx(waited)
    assert eight.bound == "the link"


def test_more_devices_than_key_value_heads_hold_copies():
    assert cache_bytes(LLAMA3_8B, 100, tensor=16) == cache_bytes(LLAMA3_8B, 100, tensor=8)
    assert weight_bytes(LLAMA3_8B, tensor=16) > weight_bytes(LLAMA3_8B) / 16


def test_a_mixture_reads_the_experts_that_its_batch_meets():
    """Qwen3-30B-A3B: one token reads 3e9 of its weights, a large batch all of them."""
    machine = replace(H100, flops=1e30)
    embedding = 151_936 * 2048

    def read(batch: int) -> float:
        return serving(QWEN3_30B, machine, 2, prompt=1, batch=batch).between_tokens * 3.35e12 / 2

    assert read(1) == pytest.approx(3.35e9 - embedding, rel=0.02)
    assert read(2000) == pytest.approx(30.53e9 - embedding, rel=0.02)
    assert read(1) < read(8) < read(64) < read(2000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Machine(0, 1, 1), "memory is 0"),
        (lambda: Machine(1, -1, 1), "bandwidth is -1"),
        (lambda: Machine(1, 1, 1, usable=2), "usable is 2"),
        (lambda: serving(LLAMA3_8B, H100, 0), "context is 0"),
        (lambda: serving(LLAMA3_8B, H100, 10, prompt=11), "prompt is 11; it is a part of the context"),
        (lambda: serving(LLAMA3_8B, H100, 10, batch=0), "batch is 0"),
        (lambda: serving(LLAMA3_8B, H100, 10, batch=1.5), "batch is 1.5; it must be a whole number"),
        (lambda: serving(LLAMA3_8B, H100, 10, quantization="nf5"), "did you mean nf4"),
        (lambda: serving(LLAMA3_8B, H100, 10, cache="fp6"), "fp6: unknown type of cache"),
        (lambda: serving(LLAMA3_8B, H100, 10, tensor=3), "32 heads and 8 key-value heads cannot be divided"),
        (lambda: serving(LLAMA3_8B, Machine(1e12, 1e12, 1e12), 10, tensor=2), "needs the link"),
        (lambda: serving(GPT2, H100, 2048), "the model has 1,024 positions"),
        (lambda: cache_bytes(LLAMA3_8B, 0), "tokens is 0"),
        (lambda: weight_bytes(LLAMA3_8B, tensor=0), "tensor is 0"),
    ],
)
def test_mistakes_get_one_message(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_answer_is_said_in_four_lines():
    lines = serving(LLAMA3_8B, H100, 8192).lines()
    assert len(lines) == 4
    assert "1.0 GiB a request of 8,192 tokens" in lines[0]
    assert "bound by memory" in lines[3]


def test_types_have_their_short_names():
    short = serving(LLAMA3_8B, H100, 8192, quantization="bf16", cache="fp8")
    assert short == serving(LLAMA3_8B, H100, 8192, quantization="bfloat16", cache="float8")
    assert cache_bytes(LLAMA3_8B, 10, "fp8") == cache_bytes(LLAMA3_8B, 10, "float8")
    assert weight_bytes(LLAMA3_8B, "fp8") == weight_bytes(LLAMA3_8B, "float8")
