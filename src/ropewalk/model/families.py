"""The families table: which Hugging Face architectures there are, and what sets each apart.

A row says how the family's config keys and weight names translate to ModelConfig and Transformer;
`families_config.py`, `families_write.py` and `families_weights.py` read it in both directions. To add a
family, add a row here and a case to CASES in tests/model/conftest.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""Marks a config key without a default."""


def _names(**changes: str) -> dict[str, str]:
    """Llama's names, which most families share, with a family's own in their place."""
    return {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "block": "model.layers.{i}",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    } | {name.replace("__", "."): value for name, value in changes.items()}


def _fused_qkv(name: str) -> dict[str, str]:
    """One matrix for queries, keys and values, in this order."""
    return {f"attention__{part}_proj": name for part in "qkv"}


@dataclass(frozen=True)
class Family:
    """One row of the table. Config keys that no entry names are refused, unless harmless."""

    architecture: str
    keys: dict[str, tuple[str, Any]]
    """ModelConfig field -> Hugging Face key and the default that transformers gives it."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """ModelConfig fields that are the same in every model of the family."""
    expect: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the computation, and the only values of them that are supported (None always is)."""
    windows: Literal["none", "all", "switched", "layer_types"] = "none"
    """How sliding layers are said: not at all; sliding_window holds for every layer; it does so if
    use_sliding_window; or by layer_types."""
    head_dim: bool = True
    """Whether the config may set head_dim apart from hidden_size / num_attention_heads."""
    prefix: str = "model."
    """What the names of all tensors but the head start with; base-model files lack it."""
    names: dict[str, str] = field(default_factory=_names)
    """Our module -> Hugging Face's, with `{i}` and `{e}` for layer and expert. Modules of the same name are
    one there: its matrix holds the rows of all of them, in our order."""
    by_head: bool = False
    """Rows of such a matrix are grouped by attention head, every group holding its share of each module."""
    transposed: bool = False
    """Block matrices are stored [in, out] (gpt2's Conv1D)."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of stored tensors that are no weights."""


def _keys(*without: str, **changes: Any) -> dict[str, tuple[str, Any]]:
    """The keys that nearly all families share, without some, and with a family's own in their place.

    A change is a pair of key and default, or the default alone: of the shared key, or of the field's name.
    """
    keys = {
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("hidden_size", REQUIRED),
        "intermediate_size": ("intermediate_size", REQUIRED),
        "num_hidden_layers": ("num_hidden_layers", REQUIRED),
        "num_attention_heads": ("num_attention_heads", REQUIRED),
        "num_key_value_heads": ("num_key_value_heads", None),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "hidden_act": ("hidden_act", "silu"),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "initializer_range": ("initializer_range", 0.02),
        "bos_token_id": ("bos_token_id", None),
        "eos_token_id": ("eos_token_id", None),
        "pad_token_id": ("pad_token_id", None),
    }
    for name, change in changes.items():
        keys[name] = change if isinstance(change, tuple) else (keys.get(name, (name,))[0], change)
    return {name: key for name, key in keys.items() if name not in without}


_SANDWICH = _names(
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
_BIASES = {"qkv_bias": ("attention_bias", False), "o_bias": ("attention_bias", False)}
_SPECIAL_1_2 = {"bos_token_id": 1, "eos_token_id": 2}
_LONG = 131_072
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_act": ("hidden_activation", "gelu_pytorch_tanh"),
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
} | _BIASES
_GEMMA_FIXED = {"norm": "rms_plus_one", "norm_placement": "sandwich", "scale_embeddings": True}


FAMILIES: dict[str, Family] = {
    # Llama 2 and 3.x, SmolLM2, TinyLlama.
    "llama": Family(
        "LlamaForCausalLM",
        _keys(mlp_bias=False, **_BIASES, **_SPECIAL_1_2),
        expect={"rope_interleaved": (False,)},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _keys(num_key_value_heads=8, max_position_embeddings=_LONG, sliding_window=4096, **_SPECIAL_1_2),
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _keys(**_QWEN), fixed={"qkv_bias": True}, windows="layer_types"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _keys(**_QWEN, head_dim=128, **_BIASES),
        fixed={"qk_norm": "head"},
        windows="layer_types",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _keys(
            **_GEMMA, max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
        fixed=_GEMMA_FIXED,
        # Hub configs carry hidden_act beside hidden_activation; transformers reads only the latter.
        expect={"use_bidirectional_attention": (False,), "hidden_act": ("gelu_pytorch_tanh",)},
        windows="layer_types",
        names=_SANDWICH,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _keys(**_GEMMA, max_position_embeddings=_LONG, final_logit_softcapping=None),
        fixed=_GEMMA_FIXED | {"qk_norm": "head"},
        # transformers does not apply attn_logit_softcapping in gemma3, so a value has no agreed meaning.
        expect={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
        windows="layer_types",
        names=_SANDWICH,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _keys(
            norm_eps=1e-5,
            max_position_embeddings=4096,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=32_000,
            pad_token_id=32_000,
        ),
        expect={"attention_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)},
        windows="all",
        names=_names(
            **_fused_qkv("self_attn.qkv_proj"),
            mlp__gate_proj="mlp.gate_up_proj",
            mlp__up_proj="mlp.gate_up_proj",
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _keys(norm_eps=1e-5, eos_token_id=50_279, pad_token_id=1, **_BIASES),
        fixed={"norm_placement": "post", "qk_norm": "projection"},
        names=_SANDWICH,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _keys(
            "num_key_value_heads",
            hidden_size=("n_embd", REQUIRED),
            intermediate_size=("n_inner", None),
            num_hidden_layers=("n_layer", REQUIRED),
            num_attention_heads=("n_head", REQUIRED),
            max_position_embeddings=("n_positions", 1024),
            norm_eps=("layer_norm_epsilon", 1e-5),
            hidden_act=("activation_function", "gelu_new"),
            tie_word_embeddings=True,
            bos_token_id=50_256,
            eos_token_id=50_256,
        ),
        fixed={
            "position": "learned",
            "norm": "layer",
            "mlp_gated": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
        # reorder_and_upcast_attn changes rounding only, not the function.
        expect={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        head_dim=False,
        prefix="transformer.",
        names=_names(
            **_fused_qkv("attn.c_attn"),
            embed="transformer.wte",
            embed_positions="transformer.wpe",
            norm="transformer.ln_f",
            block="transformer.h.{i}",
            attention__o_proj="attn.c_proj",
            mlp__up_proj="mlp.c_fc",
            mlp__down_proj="mlp.c_proj",
            attention_norm="ln_1",
            mlp_norm="ln_2",
        ),
        transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    # Pythia and GPT-NeoX.
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _keys(
            "num_key_value_heads",
            norm_eps=("layer_norm_eps", 1e-5),
            hidden_act="gelu",
            parallel_residual=("use_parallel_residual", True),
            qkv_bias=("attention_bias", True),
            o_bias=("attention_bias", True),
            bos_token_id=0,
            eos_token_id=2,
        ),
        fixed={"norm": "layer", "mlp_gated": False, "mlp_bias": True},
        head_dim=False,
        prefix="gpt_neox.",
        names=_names(
            **_fused_qkv("attention.query_key_value"),
            embed="gpt_neox.embed_in",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            block="gpt_neox.layers.{i}",
            attention__o_proj="attention.dense",
            mlp__up_proj="mlp.dense_h_to_4h",
            mlp__down_proj="mlp.dense_4h_to_h",
        ),
        by_head=True,
        ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _keys(
            num_key_value_heads=8,
            max_position_embeddings=_LONG,
            norm_eps=1e-5,
            sliding_window=None,
            num_experts=("num_local_experts", 8),
            num_experts_per_tok=2,
            router_aux_loss_coef=0.001,
            **_SPECIAL_1_2,
        ),
        fixed={"norm_topk_prob": True},
        expect={"router_jitter_noise": (0, 0.0)},
        windows="all",
        names=_names(
            mlp__router="block_sparse_moe.gate",
            mlp__experts__gate_proj="block_sparse_moe.experts.{e}.w1",
            mlp__experts__up_proj="block_sparse_moe.experts.{e}.w3",
            mlp__experts__down_proj="block_sparse_moe.experts.{e}.w2",
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _keys(
            **_QWEN | {"num_key_value_heads": 4},
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=False,
            router_aux_loss_coef=0.001,
            **_BIASES,
        ),
        fixed={"qk_norm": "head"},
        windows="switched",
        names=_names(
            mlp__router="mlp.gate",
            mlp__experts__gate_proj="mlp.experts.{e}.gate_proj",
            mlp__experts__up_proj="mlp.experts.{e}.up_proj",
            mlp__experts__down_proj="mlp.experts.{e}.down_proj",
        ),
    ),
}

HARMLESS = frozenset(
    """
    architectures auto_map model_type torch_dtype dtype transformers_version transformers.js_config
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation _experts_implementation
    initializer_range use_cache cache_implementation output_hidden_states output_attentions
    output_router_logits return_dict return_dict_in_generate chunk_size_feed_forward is_encoder_decoder
    is_decoder id2label label2id problem_type num_labels _num_labels finetuning_task task_specific_params
    tokenizer_class pretraining_tp is_llama_config n_ctx gradient_checkpointing reorder_and_upcast_attn
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob classifier_dropout
    resid_pdrop embd_pdrop attn_pdrop
    max_length min_length do_sample temperature top_k top_p typical_p num_beams num_return_sequences
    repetition_penalty length_penalty no_repeat_ngram_size early_stopping bad_words_ids
    unsloth_fixed unsloth_version
    """.split()
)
"""Config keys that say nothing about the function the model computes: bookkeeping, generation defaults,
classification heads, rounding. Dropout is among them because Ropewalk trains without it."""
