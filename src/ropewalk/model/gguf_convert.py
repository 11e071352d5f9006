"""Turns a GGUF file into a Hugging Face directory: config, weights, tokenizer, chat template.

Undoes what llama.cpp's converter (`conversion/*.py` there) did to each architecture's weights. Everything is
checked against the model that the config describes before a byte is written; then one tensor at a time is
dequantized and written, so that memory holds no more than the largest of them.

Quantized weights become float32: a block's `scale * q + offset` needs more bits than bfloat16 or float16 has.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from ropewalk.errors import UserError
from ropewalk.files import free_bytes, full_disk
from ropewalk.model.config import ModelConfig
from ropewalk.model.families import FAMILIES
from ropewalk.model.families_config import config_from_hf
from ropewalk.model.families_write import config_to_hf
from ropewalk.model.gguf import GgufFile, GgufTensor, can_dequantize
from ropewalk.model.gguf_config import config_from_gguf
from ropewalk.model.gguf_tokenizer import build_tokenizer
from ropewalk.model.load import matching_rules
from ropewalk.model.safetensors_file import FLOATS, write_safetensors
from ropewalk.model.save import special_ids, write_json

VERSION = 1
"""Part of the cache key: raise it whenever the same file would be converted differently."""

Transform = Callable[[np.ndarray], np.ndarray]
"""Undoes one of the converter's changes to a float32 tensor."""

_TOP = {"token_embd": "embed", "position_embd": "embed_positions", "output_norm": "norm", "output": "head"}
_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_qkv": "attention.q_proj",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_output": "attention.o_proj",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_mlp_norm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
"""The modules (as in the families table) that a GGUF file's tensors belong to, outside the blocks and in."""
_FUSED = ("attn_qkv", "ffn_up")
"""What matrices are called that hold several modules; the latter where the gate is fused with it (phi3)."""
_NO_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Read into the config."""


@dataclass(frozen=True)
class _Output:
    """One tensor to write: rows of a GGUF tensor, changed by `transform`."""

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    first_row: int = 0
    transform: Transform | None = None

    @property
    def dtype(self) -> str:
        """The smallest type that holds every value exactly; vectors are changed by arithmetic, so float32."""
        exact = {GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
        return exact.get(self.source.type, "F32") if len(self.shape) > 1 else "F32"


def convert(path: Path, directory: Path) -> None:
    """Writes the model in the GGUF file `path` as a Hugging Face directory into the empty folder `directory`.

    Raises UserError for a file that is damaged or says something that is not supported here,
    RopewalkError when the disk has no room for it.
    """
    file = GgufFile.open(path)
    config = config_from_hf(config_from_gguf(file), str(path))
    outputs = _plan(file, config)
    matching_rules(config, {o.name: (o.shape, path) for o in outputs}, path)
    tokenizer = build_tokenizer(file) if "tokenizer.ggml.model" in file.metadata else None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(f"{path}: it has {len(tokenizer):,} tokens for {config.vocab_size:,} embeddings")

    needed = sum(math.prod(o.shape) * (4 if o.dtype == "F32" else 2) for o in outputs)
    if needed > free_bytes(directory):
        raise full_disk(directory, needed)
    write_safetensors(
        directory / "model.safetensors",
        [(o.name, o.dtype, o.shape) for o in outputs],
        (_values(file, o) for o in outputs),
    )
    matrices = {o.dtype for o in outputs if len(o.shape) > 1}
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get("/".join(matrices), "float32")
    write_json(directory / "config.json", config_to_hf(config) | {"torch_dtype": dtype})
    write_json(directory / "generation_config.json", special_ids(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        # transformers 4 does not know the class by the name that 5 has given it
        path = directory / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(settings, indent=2) + "\n")


def _plan(file: GgufFile, config: ModelConfig) -> list[_Output]:
    """What to write, from every tensor in the file; raises UserError for one that has no place."""
    outputs: list[_Output] = []
    for tensor in file.tensors.values():
        if tensor.name in _NO_WEIGHTS:
            continue
        if not can_dequantize(tensor.type):
            raise UserError(
                f"{file.path}: tensor {tensor.name!r}: the type {tensor.type.name} cannot be read"
            )
        match = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", tensor.name)
        layer, name, kind = match.groups() if match else (None, "", "")
        target = _target(config, layer, name)
        if target is None:
            raise UserError(
                f"{file.path}: the tensor {tensor.name!r} has no place in a {config.family} model: "
                "the file holds something that is not supported"
            )
        outputs += _outputs(tensor, f"{target}.{kind}", _transform(config, name))
    return outputs


def _target(config: ModelConfig, layer: str | None, name: str) -> str | None:
    """The Hugging Face module of the tensors called `name`, with {e} for an expert; None: there is none."""
    names = FAMILIES[config.family].names
    if layer is None:
        return names.get(_TOP.get(name, ""))
    target = names.get(_BLOCK.get(name, ""))
    fused = list(names.values()).count(target or "") > 1
    if target is None or (fused and name not in _FUSED) or (name == "attn_qkv" and not fused):
        return None
    return f"{names['block'].format(i=layer)}.{target}"


def _outputs(tensor: GgufTensor, hf: str, transform: Transform | None) -> Iterator[_Output]:
    """One output, or one for each expert of a stack `[experts, rows, columns]`."""
    if "{e}" not in hf:
        transposed = transform is _transpose and len(tensor.shape) == 2
        yield _Output(hf, tensor.shape[::-1] if transposed else tensor.shape, tensor, 0, transform)
        return
    rows = tensor.shape[-2] if len(tensor.shape) == 3 else 0
    for expert in range(tensor.shape[0] if rows else 0):
        yield _Output(hf.format(e=expert), tensor.shape[1:], tensor, expert * rows, transform)


def _transform(config: ModelConfig, name: str) -> Transform | None:
    """How to undo what the converter did to the tensors called `name` in this family."""
    family = config.family
    if family in ("llama", "mixtral") and name in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
        return lambda x: _interleaved_to_halves(x, heads)
    if family.startswith("gemma") and name.endswith("norm"):
        return lambda x: x - 1
    if family == "gpt2" and name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return _transpose
    if family == "gpt_neox" and name == "attn_qkv":
        return lambda x: _group_by_head(x, config.num_attention_heads)
    return None


def _interleaved_to_halves(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face row i with row i + head_dim / 2."""
    return x.reshape(heads, x.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def _group_by_head(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows [q of all heads, k, v] -> for each head its q, k and v."""
    return x.reshape(3, heads, x.shape[0] // heads // 3, -1).swapaxes(0, 1).reshape(x.shape)


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T if x.ndim == 2 else x


def _values(file: GgufFile, output: _Output) -> torch.Tensor:
    """A tensor to write, in its dtype."""
    rows = math.prod(output.shape) // output.source.shape[-1]
    values = file.read(output.source, output.first_row, rows)
    values = values.reshape(output.source.shape if len(output.source.shape) < 3 else output.shape)
    if not np.isfinite(values).all():
        raise UserError(f"{file.path}: tensor {output.source.name!r} holds NaN or infinite values")
    if output.transform is not None:
        values = output.transform(values)
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(FLOATS[output.dtype]).reshape(output.shape)
