"""The metadata of a GGUF file as a Hugging Face config.

llama.cpp's own loaders (`src/models/*.cpp`) and its converter (`conversion/*.py`) say what a key means and
what holds where a file says nothing. A key that changes the computation and is not understood is refused.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.model.families import FAMILIES
from ropewalk.model.gguf import GgufFile

_REQUIRED: Any = object()
_HARMLESS = frozenset(
    {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "expert_count"}
)


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in a GGUF file; raises UserError for what cannot be said there."""
    keys = _Keys(file)
    build = ARCHITECTURES.get(keys.architecture)
    if build is None:
        raise keys.fail(
            f"its architecture {keys.architecture!r} is not supported; these are: " + ", ".join(ARCHITECTURES)
        )
    parts = file.metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts not in (0, 1):
        raise keys.fail("it is one part of a split model; join the parts with llama-gguf-split --merge")
    fields = build(keys)
    keys.refuse_unused()
    family = FAMILIES[fields["model_type"]]
    config = {family.keys.get(name, (name,))[0]: value for name, value in fields.items()}
    ends = list(dict.fromkeys(_token_ids(file, config, "eos", "eot")))
    config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    config["bos_token_id"] = next(_token_ids(file, config, "bos"), None)
    config["pad_token_id"] = next(_token_ids(file, config, "padding"), None)
    return config


def _token_ids(file: GgufFile, config: dict[str, Any], *names: str) -> Iterator[int]:
    """Ids of special tokens; one outside the vocabulary counts as not given, as in llama.cpp."""
    for name in names:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int) and 0 <= value < config["vocab_size"]:
            yield value


class _Keys:
    """Checked access to `<architecture>.*`, remembering which keys somebody understood."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.used: set[str] = set()
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.fail("it does not name its architecture (general.architecture)")
        self.architecture = architecture

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self.file.path}: this GGUF file cannot be converted: {problem}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        self.used.add(name)
        value = self.file.metadata.get(f"{self.architecture}.{name}", default)
        if value is _REQUIRED:
            raise self.fail(f"the key {self.architecture}.{name} is missing")
        return value

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """A size; a list with one for each layer is understood where all are the same."""
        value = self.get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self.fail(f"{self.architecture}.{name} is {value!r}; a number from {least} is wanted")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(f"{self.architecture}.{name} is {value!r}; a number is wanted")
        return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06

    def text(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.fail(f"{self.architecture}.{name} is {value!r}; a text is wanted")
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def vector(self, tensor: str) -> np.ndarray | None:
        found = self.file.tensors.get(tensor)
        return None if found is None else self.file.read(found).ravel()

    def refuse_unused(self) -> None:
        prefix = f"{self.architecture}."
        names = {key.removeprefix(prefix) for key in self.file.metadata if key.startswith(prefix)}
        if unknown := sorted(names - self.used - _HARMLESS):
            raise self.fail(f"what {prefix + unknown[0]} = {self.get(unknown[0])!r} means is not known here")


def _common(keys: _Keys, model_type: str) -> dict[str, Any]:
    """What every architecture has: fields of ModelConfig, and config keys for what is no single field.

    What is not said here has the family's default, which is then what llama.cpp does.
    """
    family = FAMILIES[model_type]
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(1, hidden // heads))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.fail("its keys and values have different sizes")
    if keys.get("attention.causal", True) is not True:
        raise keys.fail("its attention is not causal")
    if not keys.has("token_embd.weight"):
        raise keys.fail("it has no tensor token_embd.weight")
    blocks = keys.integer("block_count")
    if blocks > len(keys.file.tensors):
        raise keys.fail(f"it claims {blocks:,} blocks but holds {len(keys.file.tensors):,} tensors")
    kind = "" if family.fixed.get("norm") == "layer" else "rms_"
    fields = {
        "model_type": model_type,
        "vocab_size": keys.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "norm_eps": keys.number(f"attention.layer_norm_{kind}epsilon"),
        "tie_word_embeddings": not keys.has("output.weight"),
    }
    shared = keys.integer("attention.head_count_kv", heads)
    if shared != heads or "num_key_value_heads" in family.keys:
        fields["num_key_value_heads"] = shared
    return fields


def _rms_decoder(keys: _Keys, model_type: str) -> dict[str, Any]:
    """RMSNorm and RoPE over whole heads."""
    fields = _common(keys, model_type) | _rope(keys)
    if keys.integer("rope.dimension_count", fields["head_dim"]) != fields["head_dim"]:
        raise keys.fail("RoPE turns only a part of each head, which is not supported for this architecture")
    return fields


def _rope(keys: _Keys) -> dict[str, Any]:
    """rope_theta and rope_scaling (rope_parameters follows from them)."""
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", 1.0)
    original = keys.integer("rope.scaling.original_context_length", 0, least=0)
    scaling: dict[str, Any] | None = None
    if kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = original or keys.integer("context_length")
        for name in ("beta_fast", "beta_slow"):
            if value := keys.number(f"rope.scaling.yarn_{name}", 0.0):
                scaling[name] = value
    elif kind not in ("none", "linear") or factor != 1.0:
        raise keys.fail(f"RoPE scaling of the kind {kind!r} with factor {factor} is not supported")
    if keys.has("rope_freqs.weight"):
        if scaling is not None:
            raise keys.fail(f"it has both rope_freqs.weight and RoPE scaling of the kind {kind!r}")
        scaling = _llama3_scaling(keys, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(keys: _Keys, theta: float) -> dict[str, Any] | None:
    """Llama 3.1's scaling, of which the file holds only the resulting divisor of each frequency.

    The parameters that every published model has are tried; others are refused, not approximated.
    """
    divisors = keys.vector("rope_freqs.weight")
    assert divisors is not None
    if (divisors == 1).all():
        return None
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    turns = original / (2 * math.pi) * theta ** -(np.arange(len(divisors)) / len(divisors))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise keys.fail("its rope_freqs.weight is not Llama 3.1's scaling, and no other is known here")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _experts(keys: _Keys) -> dict[str, Any]:
    """Sizes of a mixture of experts, checked against the router's rows (a lying count would cost memory)."""
    count = keys.integer("expert_count")
    router = keys.file.tensors.get("blk.0.ffn_gate_inp.weight")
    if router is None or router.shape[0] != count:
        raise keys.fail(f"it claims {count:,} experts; blk.0.ffn_gate_inp.weight does not have as many rows")
    return {"num_experts": count, "num_experts_per_tok": keys.integer("expert_used_count")}


def _llama(keys: _Keys) -> dict[str, Any]:
    if keys.integer("expert_count", 0, least=0):
        return _rms_decoder(keys, "mixtral") | _experts(keys)
    keys.integer("expert_used_count", 0, least=0)
    biases = {"mlp_bias": keys.has("blk.0.ffn_up.bias")}
    return _rms_decoder(keys, "llama") | _attention_bias(keys) | biases


def _attention_bias(keys: _Keys) -> dict[str, Any]:
    return {"attention_bias": keys.has("blk.0.attn_q.bias")}


def _qwen3(keys: _Keys) -> dict[str, Any]:
    return _rms_decoder(keys, "qwen3") | _attention_bias(keys)


def _qwen3moe(keys: _Keys) -> dict[str, Any]:
    return _rms_decoder(keys, "qwen3_moe") | {
        **_experts(keys),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does for this architecture
    }


def _gemma(keys: _Keys, model_type: str, pattern: int, largest: int) -> dict[str, Any]:
    """Gemma 2 and 3; every `pattern`-th layer sees everything."""
    fields = _rms_decoder(keys, model_type)
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    window = keys.integer("attention.sliding_window", 4096 if model_type == "gemma2" else 0, least=0)
    sliding = [window > 0 and (i + 1) % pattern != 0 for i in range(layers)]
    given = keys.get("attention.sliding_window_pattern", None)
    if isinstance(given, np.ndarray) and given.shape == (layers,):
        sliding = [window > 0 and bool(x) for x in given]
    elif given is not None and (isinstance(given, np.ndarray) or given != pattern):
        raise keys.fail(f"its attention.sliding_window_pattern is {given!r}")
    # The scale of queries is not in the file: the family's largest model alone does not go by head_dim.
    by_width = layers == largest
    return fields | {
        "query_pre_attn_scalar": fields["hidden_size"] // heads if by_width else fields["head_dim"],
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
    }


def _gemma2(keys: _Keys) -> dict[str, Any]:
    return _gemma(keys, "gemma2", pattern=2, largest=46) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    return _gemma(keys, "gemma3_text", pattern=6, largest=62) | {
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
    }


def _phi3(keys: _Keys) -> dict[str, Any]:
    fields = _common(keys, "phi3")
    original = keys.integer("rope.scaling.original_context_length", fields["max_position_embeddings"])
    long, short = keys.vector("rope_factors_long.weight"), keys.vector("rope_factors_short.weight")
    keys.get("rope.scaling.attn_factor", None)  # transformers works out the same
    if keys.text("rope.scaling.type", "longrope") != "longrope":
        raise keys.fail("its RoPE scaling is not 'longrope'")
    scaling = None
    if long is not None and short is not None:
        scaling = {"rope_type": "longrope", "long_factor": _floats(long), "short_factor": _floats(short)}
    return fields | {
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": _rotary_share(keys, fields["head_dim"], fields["head_dim"]),
        "sliding_window": keys.integer("attention.sliding_window", 0, least=0) or None,
    }


def _rotary_share(keys: _Keys, head_dim: int, default: Any = _REQUIRED) -> float:
    """The share of each head that RoPE turns, such that int(share * head_dim) is what the file says."""
    turned = keys.integer("rope.dimension_count", default)
    share = turned / head_dim
    return share if int(share * head_dim) == turned else math.nextafter(share, 2.0)


def _floats(values: np.ndarray) -> list[float]:
    return [float(str(x)) for x in values.astype(np.float32)]


def _gptneox(keys: _Keys) -> dict[str, Any]:
    fields = _common(keys, "gpt_neox")
    return fields | {
        "parallel_residual": keys.get("use_parallel_residual", True),
        "rotary_emb_base": keys.number("rope.freq_base", 10000.0),
        "rotary_pct": _rotary_share(keys, fields["head_dim"]),
    }


ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,  # also mistral, mixtral and SmolLM2
    "qwen2": partial(_rms_decoder, model_type="qwen2"),
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": partial(_rms_decoder, model_type="olmo2"),
    "gpt2": partial(_common, model_type="gpt2"),
    "gptneox": _gptneox,
}
"""general.architecture -> what reads its keys: fields of ModelConfig, or config keys."""
