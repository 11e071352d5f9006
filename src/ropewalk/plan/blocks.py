"""What a block of a model is made of: its parameters by name, its matrix products, the pairs it attends."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from ropewalk.model.config import ModelConfig

Product = tuple[float, float, float, float]
"""[m, k] x [k, n], and how many of them: (m, n, k, count)"""
Kinds = tuple[tuple[bool, int | None, int], ...]


def layer_kinds(config: ModelConfig) -> Kinds:
    """The kinds of layers and how many there are of each: (mixture of experts?, window, count)."""
    return _kinds(config.num_hidden_layers, config.moe_layers, config.layer_types, config.sliding_window)


@lru_cache(maxsize=64)
def _kinds(layers: int, moe: tuple[int, ...], types: tuple[str, ...], window: int | None) -> Kinds:
    mixed = set(moe)
    counted = Counter(
        (layer in mixed, window if types and types[layer] == "sliding_attention" else None)
        for layer in range(layers)
    )
    return tuple((*kind, count) for kind, count in counted.items())


def block_shapes(config: ModelConfig, moe: bool) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, how many) of each parameter of a block without adapters."""
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    norms = {"attention_norm": hidden, "mlp_norm": hidden} if before else {}
    norms |= {"post_attention_norm": hidden, "post_mlp_norm": hidden} if after else {}
    if config.qk_norm is not None:
        whole = config.qk_norm == "projection"
        norms |= {"attention.q_norm": q if whole else dim, "attention.k_norm": kv if whole else dim}
    for name, size in norms.items():
        yield f"{name}.weight", (size,), 1
        if config.norm == "layer":
            yield f"{name}.bias", (size,), 1
    matrices = [
        (f"attention.{n}_proj", s, hidden, config.qkv_bias, 1) for n, s in {"q": q, "k": kv, "v": kv}.items()
    ]
    matrices.append(("attention.o_proj", hidden, q, config.o_bias, 1))
    room, inner, copies = "mlp", config.intermediate_size, 1
    if moe:
        room, inner, copies = "mlp.experts.0", config.moe_intermediate_size, config.num_experts
        yield "mlp.router.weight", (config.num_experts, hidden), 1
    if config.mlp_gated:
        matrices.append((f"{room}.gate_proj", inner, hidden, config.mlp_bias, copies))
    matrices.append((f"{room}.up_proj", inner, hidden, config.mlp_bias, copies))
    matrices.append((f"{room}.down_proj", hidden, inner, config.mlp_bias, copies))
    for name, rows, columns, bias, number in matrices:
        yield f"{name}.weight", (rows, columns), number
        if bias:
            yield f"{name}.bias", (rows,), number


def block_products(
    config: ModelConfig, moe: bool, tokens: float = 1, tensor: int = 1, experts: float | None = None
) -> list[Product]:
    """The products of a block's forward on one of `tensor` devices, the one out of the MLP last.

    experts: of a mixture those that the device has, all if None; as many tokens come to them as go.
    """
    h, d = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads / tensor, max(1.0, config.num_key_value_heads / tensor)
    gates = 2 if config.mlp_gated else 1
    products: list[Product] = [(tokens, (heads + 2 * kv) * d, h, 1), (tokens, h, heads * d, 1)]
    if not moe:
        wide = config.intermediate_size / tensor
        return [*products, (tokens, gates * wide, h, 1), (tokens, h, wide, 1)]
    here = config.num_experts if experts is None else experts
    sent = tokens * config.num_experts_per_tok / here
    wide = config.moe_intermediate_size / tensor
    routed = [(tokens, config.num_experts, h, 1), (sent, gates * wide, h, here), (sent, h, wide, here)]
    return products + routed


def weights_of(products: Sequence[Product]) -> float:
    """Numbers in the matrices of products."""
    return sum(n * k * count for _, n, k, count in products)


def attended(sequence: int, window: int | None, document: float | None, fused: bool) -> float:
    """(query, key) pairs that are computed in a row: of each document, causal, inside the window.

    Scores that are written out are computed for all pairs.
    """
    if not fused:
        return float(sequence) ** 2
    length = min(float(sequence), document or sequence)
    reach = min(length, window or length)
    return sequence * (reach - (reach - 1) * reach / (2 * length))
