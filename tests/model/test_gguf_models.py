"""Every architecture that GGUF files are converted from: a tiny random transformers model is written the way
llama.cpp's converter does it, with the `gguf` package's names. The conversion back must give the same logits,
and llama.cpp must read the file as we do."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from ropewalk.errors import UserError
from ropewalk.model.gguf import GgufFile
from ropewalk.model.gguf_convert import convert
from ropewalk.model.load import load_model

VOCAB = 384
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG |= {
    "original_max_position_embeddings": 256,
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", "Llama", {"head_dim": 24}),
    "llama-bias": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear": (
        "llama",
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral": ("llama", "Mistral", {"head_dim": 16, "sliding_window": None}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 24}),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": ("gemma2", "Gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 5}),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 5, "num_hidden_layers": 7},
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": None}),
    "phi3-long": (
        "phi3",
        "Phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 512, "original_max_position_embeddings": 256},
    ),
    "olmo2": ("olmo2", "Olmo2", {}),
    "gpt2": ("gpt2", "GPT2", {}),
    "gptneox": ("gptneox", "GPTNeoX", {"rotary_pct": 0.5}),
    "gptneox-serial": ("gptneox", "GPTNeoX", {"use_parallel_residual": False}),
}
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
GPT2_NAMES |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}


def make_model(family: str, changes: dict[str, Any]) -> Any:
    """A random float32 model whose norms and biases are not at their neutral start."""
    torch.manual_seed(0)
    values = {"tie_word_embeddings": False} | SHARED | changes
    if family in ("GPT2", "GPTNeoX"):
        values = {k: v for k, v in values.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    if family == "GPT2":
        values = {GPT2_NAMES.get(k, k): v for k, v in values.items()}
        values |= {"tie_word_embeddings": True}
    if family.startswith("Gemma"):
        values |= {"tie_word_embeddings": True}
    config = getattr(transformers, f"{family}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    """The keys that the converter writes for this architecture."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 0) or config.n_inner)
    writer.add_head_count(heads)
    if architecture in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        if architecture != "phi3":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
    if architecture in ("llama", "phi3", "gptneox"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture == "phi3":
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            stretch = np.log(config.max_position_embeddings / original) / np.log(original)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + stretch)))
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(local["rope_theta"])
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def tensors(architecture: str, model: Any) -> dict[str, torch.Tensor]:
    """The model's weights with the names and layouts of a GGUF file."""
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            layer = name.split(".")[2]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = gate, up
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        new = names.get_name(stem)
        assert new is not None, name
        found[f"{new}.{suffix}"] = changed(architecture, name, value, config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_divisors(rope, config.head_dim)
    if rope.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = torch.tensor(rope["long_factor"])
        found["rope_factors_short.weight"] = torch.tensor(rope["short_factor"])
    return found


def changed(architecture: str, name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    """What the converter does to some tensors."""
    heads = config.num_attention_heads
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        count = heads if "q_proj" in name else config.num_key_value_heads
        return value.reshape(count, 2, len(value) // count // 2, -1).transpose(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and value.ndim == 2 and ".h." in name:
        return value.T.contiguous()
    if architecture == "gptneox" and "query_key_value" in name:
        grouped = value.reshape(heads, 3, config.hidden_size // heads, -1)
        return torch.cat([grouped[:, i].reshape(config.hidden_size, -1) for i in range(3)]).reshape(
            value.shape
        )
    return value


def llama3_divisors(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """Plain frequencies divided by those that transformers computes."""
    config = transformers.LlamaConfig(**SHARED | {"rope_parameters": rope, "head_dim": dim})
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    return (plain / scaled).float()


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    tokenizer: Path,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> None:
    """The whole file; matrices in `types` by the end of their names, else float32."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer, architecture, model.config)
    words = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, value in tensors(architecture, model).items():
        kind = next((t for end, t in (types or {}).items() if name.endswith(end)), None)
        data = value.numpy()
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(path: Path) -> Path:
    directory = path.with_suffix("")
    directory.mkdir()
    convert(path, directory)
    return directory


def prompt() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_converted_model_gives_the_original_logits(
    case: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    architecture, family, changes = CASES[case]
    model = make_model(family, changes)
    write_gguf(tmp_path / "m.gguf", architecture, model, tiny_tokenizer_dir)
    directory = converted(tmp_path / "m.gguf")
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    ours = load_model(directory)
    with torch.no_grad():
        wanted, got = model(prompt()).logits, again(prompt()).logits
        got_ours = ours.logits(ours(prompt()))
    assert wanted.std() > 0.1  # a model that says nothing would agree with everything
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got_ours, wanted, atol=5e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_reads_the_file_as_we_do(case: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """The log-probabilities after a prompt, from llama.cpp on the same file."""
    xllamacpp = pytest.importorskip("xllamacpp")
    architecture, family, changes = CASES[case]
    write_gguf(tmp_path / "m.gguf", architecture, make_model(family, changes), tiny_tokenizer_dir)
    directory = converted(tmp_path / "m.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokens = prompt()[:1]
    with torch.no_grad():
        wanted = model(tokens).logits[0, -1].log_softmax(-1)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "m.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.verbosity = 64, 1, 0, -1
    parameters.warmup = parameters.fit_params = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    body = {"prompt": tokens[0].tolist(), "n_predict": 1, "n_probs": VOCAB}
    body["logit_bias"] = [[40, 1000.0]]  # samples a whole character, without which nothing is reported
    request = urllib.request.Request(
        server.listening_address + "/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        first = json.load(reply)["completion_probabilities"][0]["top_logprobs"]
    got = torch.tensor([next(x["logprob"] for x in first if x["id"] == i) for i in range(VOCAB)])
    # llama.cpp computes gelu through a float16 table
    torch.testing.assert_close(got, wanted, atol=5e-3, rtol=0)


def test_types_that_nobody_can_dequantize_are_refused_by_name(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    model = make_model("Llama", {})
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", model, tiny_tokenizer_dir)
    name = b"blk.0.attn_norm.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 8  # past the dimensions: the type
    data[at] = gguf.GGMLQuantizationType.I32
    path.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"'blk.0.attn_norm.weight': the type I32 cannot be read"):
        convert(path, tmp_path / "out")


def test_half_precision_is_kept_and_quantized_weights_become_float32(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Exact and small: no value changes, and what fits 16 bits is stored in them."""
    from safetensors import safe_open

    kinds = gguf.GGMLQuantizationType
    types = {"ffn_up.weight": kinds.F16, "ffn_down.weight": kinds.BF16, "attn_v.weight": kinds.Q8_0}
    model = make_model("Llama", {})
    write_gguf(tmp_path / "m.gguf", "llama", model, tiny_tokenizer_dir, types)
    with safe_open(converted(tmp_path / "m.gguf") / "model.safetensors", "pt") as file:
        up = file.get_tensor("model.layers.1.mlp.up_proj.weight")
        down = file.get_tensor("model.layers.1.mlp.down_proj.weight")
        value = file.get_tensor("model.layers.1.self_attn.v_proj.weight")
    weights = model.state_dict()
    assert torch.equal(up, weights["model.layers.1.mlp.up_proj.weight"].half())
    assert torch.equal(down, weights["model.layers.1.mlp.down_proj.weight"].bfloat16())
    v = weights["model.layers.1.self_attn.v_proj.weight"].numpy()
    np.testing.assert_array_equal(
        value.numpy(), gguf.quants.dequantize(gguf.quants.quantize(v, kinds.Q8_0), kinds.Q8_0)
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture 'mamba' is not supported"),
        ("llama.attention.clamp_kqv", 8.0, "what llama.attention.clamp_kqv = 8.0 means"),
        ("llama.block_count", 4, "model.layers.3"),
        ("llama.block_count", 2_000_000, "claims 2,000,000 blocks"),
        ("llama.expert_count", 2_000_000_000, "claims 2,000,000,000 experts"),
        ("llama.embedding_length", 63, "has the shape"),
        ("llama.attention.head_count", 7, "cannot|divide|shape"),
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("split.count", 3, "llama-gguf-split --merge"),
        ("tokenizer.ggml.model", "bert", "its kind is 'bert'"),
        ("tokenizer.ggml.pre", "nonsense", "pre-tokenizer 'nonsense'"),
    ],
)
def test_what_cannot_be_done_right_is_refused_by_name(
    key: str,
    value: Any,
    message: str,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", make_model("Llama", {}), tiny_tokenizer_dir)
    true = GgufFile.open(path)
    lying = GgufFile(path, true.metadata | {key: value}, true.tensors)
    monkeypatch.setattr(GgufFile, "open", classmethod(lambda cls, path: lying))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message) as error:
        convert(path, tmp_path / "out")
    assert "m.gguf" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_tensor_too_many_is_refused(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Weights that would be dropped in silence change the model."""
    model = make_model("Llama", {"attention_bias": True})
    write_gguf(tmp_path / "b.gguf", "llama", model, tiny_tokenizer_dir)
    data = (tmp_path / "b.gguf").read_bytes().replace(b"blk.1.attn_q.bias", b"blk.1.attn_x.bias")
    (tmp_path / "b.gguf").write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"'blk.1.attn_x.bias' has no place in a llama model"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
