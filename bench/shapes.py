"""Shapes of the models that benchmarks train, as Hugging Face config fields. Weights are random."""

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _shape(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **others,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(64, 128, 2, 4, 2, 512),
    # 12.3M of its 30.0M parameters are the embeddings, and the head; as many key as query heads, as GPT-2
    "30m": _shape(384, 1024, 10, 6, 6, 32000),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, rope_theta=100000.0),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, rope_theta=500000.0),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, 128256, rope_theta=500000.0, head_dim=128),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0, tie_word_embeddings=False),
}
"""The Llama-3.2 ones without their rotary frequencies' scaling, which changes no cost."""


def parameters(config: dict[str, Any]) -> int:
    """Number of weights; a tied matrix counts once."""
    hidden = config["hidden_size"]
    block = sum(rows * columns for rows, columns in matrices(config)) + 2 * hidden
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * block + hidden + tables * config["vocab_size"] * hidden


def matrices(config: dict[str, Any]) -> list[tuple[int, int]]:
    """The sizes of a block's matrices."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), *[(inner, hidden)] * 2, (hidden, inner)]


def block_bytes(config: dict[str, Any], rank: int) -> int:
    """What a block of a QLoRA run holds: NF4 weights with their scales (0.5161 bytes a weight), norms, and
    adapters in bfloat16 with float32 masters, moments and gradients."""
    frozen = sum(rows * columns for rows, columns in matrices(config))
    trained = sum(rank * (rows + columns) for rows, columns in matrices(config))
    return round(frozen * (1 / 2 + 1 / 64 + 4 / (64 * 256))) + 4 * config["hidden_size"] + 18 * trained
