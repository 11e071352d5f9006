"""What a decoder-only transformer is made of, in Hugging Face's field names where they exist."""

from dataclasses import dataclass
from typing import Any, Literal

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and computation of one model; nothing in it depends on how it is run.

    `config_from_hf` builds one from a Hugging Face config and refuses what this class cannot say.
    Sizes count elements, positions count tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int

    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    """None for plain RoPE, else `rope_type` and its parameters as in Hugging Face's rope_scaling."""
    partial_rotary_factor: float = 1.0
    rope_local_theta: float | None = None
    """Base of plain RoPE in the sliding layers (gemma3); rope_theta is then that of the full ones."""

    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """RMSNorm, RMSNorm that multiplies by 1 + weight (gemma), or LayerNorm with bias."""
    norm_eps: float = 1e-6
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before each sub-layer, after it (olmo2), or both (gemma)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (gpt_neox)."""
    qk_norm: Literal["head", "projection"] | None = None
    """Norm of queries and keys: per head (qwen3, gemma3) or over the whole projection (olmo2)."""

    hidden_act: str = "silu"
    mlp_gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    layer_types: tuple[LayerType, ...] = ()
    """One per layer; empty: all full attention."""
    sliding_window: int | None = None
    """Keys a query of a sliding layer sees, itself included."""
    query_pre_attn_scalar: float | None = None
    """q.k is multiplied by this ** -0.5; None: by head_dim ** -0.5."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    scale_embeddings: bool = False
    """Multiply embeddings by hidden_size ** 0.5, rounded to the model's dtype (gemma)."""
    tie_word_embeddings: bool = False

    moe_layers: tuple[int, ...] = ()
    """Layers whose MLP is a mixture of experts."""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    """Let the weights of the chosen experts sum to 1."""
    router_aux_loss_coef: float = 0.0

    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, itself included; None: all before it."""
        sliding = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    @property
    def attention_scale(self) -> float:
        """The factor on q.k."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, however many there are."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
