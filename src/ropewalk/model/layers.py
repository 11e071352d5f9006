"""The parts of a block."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler, 2 seconds

from ropewalk.model.cache import KVCache
from ropewalk.model.config import ModelConfig
from ropewalk.model.virtual import KeyValues
from ropewalk.ops.attention import AttentionLayout, attention, attention_cached, cached_mask
from ropewalk.ops.gated import gated_silu
from ropewalk.ops.linear import Linear
from ropewalk.ops.native import takes
from ropewalk.ops.norm import layer_norm, rms_norm
from ropewalk.ops.rope import apply_rope


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "relu": F.relu,
}
"""Hugging Face's names; the three approximations are the same formula."""

Tables = tuple[Tensor, Tensor]


@dataclass
class Context:
    """What the blocks of one forward share: made once, read by every layer."""

    layout: AttentionLayout | None
    """Documents of the batch; None: attend over the cache."""
    rope: Tables | None = None
    """cos and sin; None for learned positions."""
    local_rope: Tables | None = None
    """Those of sliding layers, where they differ."""
    cache: KVCache | None = None
    query_positions: Tensor | None = None
    real: Tensor | None = None
    """`[B * S]` bool, false at padding; None: no padding."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    virtual: list[KeyValues] | None = None
    """Keys and values of the virtual tokens before every document, layer by layer; those in a cache already
    are not here."""
    attention: Callable[..., Tensor] = attention
    """of tokens that are all there is; another one where processes share the tokens of a row"""
    reads_virtual: bool = False
    """The tokens are the virtual ones themselves: each layer adds what it made of them to `virtual`."""

    @_disable_dynamo  # the layout differs from batch to batch, the layer from block to block
    def attend(self, layer: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, S, heads, D]`, k and v `[B, S, kv_heads, D]` of the new tokens -> as q."""
        cache, window, softcap, scale = self.cache, layer.window, layer.softcap, layer.scale
        before = None
        if self.virtual is not None and self.reads_virtual:
            self.virtual.append((k[0], v[0]))
        elif self.virtual is not None:
            before = self.virtual[layer.index]
        if cache is not None:
            if before is not None:
                cache.fill_virtual(layer.index, *before)
            keys, values = cache.append(layer.index, k, v)
        if cache is None or self.layout is not None:  # the new tokens are all there is
            assert self.layout is not None
            return self.attention(
                q, k, v, layout=self.layout, window=window, softcap=softcap, scale=scale, prefix=before
            )
        if q.shape[1] == 1 and not cache.ragged:
            if window is not None and window < keys.shape[2]:
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            return attention_cached(q, keys, values, softcap=softcap, scale=scale)
        if window not in self.masks:
            assert self.query_positions is not None
            slots = cache.positions[:, : keys.shape[2]]
            rows = slots if cache.ragged else slots[:1]
            self.masks[window] = cached_mask(self.query_positions, rows, window)
        return attention_cached(q, keys, values, mask=self.masks[window], softcap=softcap, scale=scale)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; `plus_one` multiplies by 1 + weight (gemma)."""

    def __init__(self, size: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() + 1.0 if self.plus_one else self.weight
        return rms_norm(x, scale, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, by `ops.norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm that the config asks for, over `size` elements."""
    if config.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm == "rms_plus_one")


class Attention(nn.Module):
    """Grouped-query self-attention (arXiv 2305.13245) with rotary positions and optional norms of q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.index, self.head_dim = layer, dim
        self.window, self.softcap = config.window(layer), config.attn_logit_softcapping
        self.scale = config.attention_scale
        self.q_proj = Linear(hidden, q, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, kv, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, kv, bias=config.qkv_bias)
        self.o_proj = Linear(q, hidden, bias=config.o_bias)
        self.norm_whole = config.qk_norm == "projection"
        self.norm_heads = config.qk_norm == "head"
        if config.qk_norm is not None:
            self.q_norm = make_norm(config, q if self.norm_whole else dim)
            self.k_norm = make_norm(config, kv if self.norm_whole else dim)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """hidden `[B, S, hidden_size]` -> the same shape."""
        batch, length, _ = hidden.shape
        heads = (batch, length, -1, self.head_dim)
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        if self.norm_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        local = self.window is not None and context.local_rope is not None
        tables = context.local_rope if local else context.rope
        if tables is not None:
            q, k = apply_rope(q, *tables), apply_rope(k, *tables)
        out = context.attend(self, q, k, v)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nn.Module):
    """Feed-forward layer: `down(act(gate(x)) * up(x))` (arXiv 2002.05202), or plain `down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(hidden, size, bias=bias) if config.mlp_gated else None
        self.up_proj = Linear(hidden, size, bias=bias)
        self.down_proj = Linear(size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., hidden_size]` -> the same shape."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        if self.activation is F.silu and takes(x):
            return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
