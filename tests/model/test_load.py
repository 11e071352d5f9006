"""Loading weights: exact, in little memory, into memory of its own; damaged files are one message each."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ropewalk.adapt import quantize_base
from ropewalk.errors import UserError
from ropewalk.model import from_config, load_model, load_tokenizer, save_model
from ropewalk.model.safetensors_file import read_header
from ropewalk.ops import QUANTIZED, QuantizedTensor

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    path = tmp_path / "model"
    path.mkdir()
    for file in tiny_llama_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def rewrite(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights = {name: value.clone() for name, value in weights.items()}
    change(weights)
    (model_dir / "model.safetensors").unlink()
    save_file(weights, model_dir / "model.safetensors")


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_values_are_those_of_a_plain_conversion(
    stored: torch.dtype, wanted: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in every dtype and also when a tensor is read in several pieces."""
    rewrite(model_dir, lambda w: w.update({name: value.to(stored) for name, value in w.items()}))
    original = load_file(model_dir / "model.safetensors")
    monkeypatch.setattr("ropewalk.model.safetensors_file.CHUNK_VALUES", 100)
    model = load_model(model_dir, dtype=wanted)
    dtype = getattr(torch, wanted)
    assert torch.equal(model.blocks[1].mlp.down_proj.weight, original[DOWN].to(dtype))
    assert torch.equal(model.embed.weight, original["model.embed_tokens.weight"].to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.head.weight is model.embed.weight
    assert not model.training


def test_fused_and_transposed_weights_in_bfloat16(make_pair: Any) -> None:
    """What is cut up on the way gets the same values as what is not."""
    for name in ("phi3-grouped", "gpt2", "gpt_neox", "mixtral-grouped"):
        pair = make_pair(name)
        half = load_model(pair.path, dtype="bfloat16")
        for parameter, low in zip(pair.ours.parameters(), half.parameters(), strict=True):
            assert torch.equal(parameter.bfloat16(), low)


def test_training_in_place_leaves_the_file_alone(model_dir: Path) -> None:
    before = (model_dir / "model.safetensors").read_bytes()
    model = load_model(model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (model_dir / "model.safetensors").read_bytes() == before
    assert not torch.equal(load_model(model_dir).embed.weight, model.embed.weight)


def test_shards_are_read_through_their_index(model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    save_model(model, tokenizer, tmp_path / "sharded", shard_bytes=10_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    again = load_model(tmp_path / "sharded")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


MEASURE = """
import resource, sys
import torch
from ropewalk.model import load_model
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
before = peak()
model = load_model(sys.argv[1], dtype=sys.argv[2])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_peak_memory_is_at_most_1_3_of_the_model(dtype: str, model_type: str, tmp_path: Path) -> None:
    """About 100 MB of float32 weights, plain and fused; a fresh process each time."""
    sizes = {"vocab_size": 8000, "hidden_size": 640, "intermediate_size": 1600, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 10, "num_key_value_heads": 5, "bos_token_id": 1, "eos_token_id": 2}
    model = from_config({"model_type": model_type, "pad_token_id": 0, **sizes}, seed=0)
    save_model(model, None, tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 95_000_000
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), dtype]
    ratio = float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert 0.9 < ratio < 1.3


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = header_of(path)
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def cut(model_dir: Path, count: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-count])


def pickled(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")


def index(model_dir: Path, where: str) -> None:
    names = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").rename(model_dir / "a.safetensors")
    weights = dict.fromkeys(names, "a.safetensors") | {DOWN: where}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def config(model_dir: Path, **fields: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil(weights: dict[str, torch.Tensor], value: float) -> None:
    weights[DOWN][3, 5] = value


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: cut(d, 1000), r"model.safetensors.*truncated: 1,000 of"),
    "only a header": (lambda d: cut(d, 10**9), r"model.safetensors.*header does not fit"),
    "missing tensor": (lambda d: rewrite(d, lambda w: w.pop(DOWN)), f"{DOWN} is missing"),
    "unexpected tensor": (
        lambda d: rewrite(d, lambda w: w.update({"model.extra.weight": torch.zeros(3)})),
        "no such tensors: model.extra.weight",
    ),
    "shape": (
        lambda d: rewrite(d, lambda w: w.update({DOWN: torch.zeros(3, 4)})),
        rf"model.safetensors: {DOWN} has the shape \(3, 4\); the model's config makes it \(32, 64\)",
    ),
    "NaN": (lambda d: rewrite(d, lambda w: spoil(w, float("nan"))), f"model.safetensors: {DOWN} holds NaN"),
    "infinite": (lambda d: rewrite(d, lambda w: spoil(w, float("-inf"))), f"{DOWN} holds NaN or infinite"),
    "quantized": (
        lambda d: rewrite(d, lambda w: w.update({DOWN: w[DOWN].to(torch.int8)})),
        f"{DOWN} is stored as I8; only unquantized",
    ),
    "pickle": (pickled, "pickled .*a pickle can run code; convert them to safetensors"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "it has no weights"),
    "missing shard": (lambda d: index(d, "b.safetensors"), r"b.safetensors: this shard is missing"),
    "shard outside": (lambda d: index(d, "../other/b.safetensors"), "not a file beside it"),
    "broken index": (
        lambda d: (pickled(d), (d / "model.safetensors.index.json").write_text('{"weight_map": 3}')),
        "not a safetensors index",
    ),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"config.json: not a JSON object"),
    "too many layers": (lambda d: config(d, num_hidden_layers=4_000), "tensors are too few"),
    "header is no JSON": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"x" * 20),
        "its header is not JSON",
    ),
    "header length": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "header does not fit",
    ),
    "header entry": (
        lambda d: with_header(d / "model.safetensors", lambda h: h[DOWN].update(shape=[1 << 40, 1 << 40])),
        f"entry for '{DOWN}' makes no sense",
    ),
    "negative shape": (
        lambda d: with_header(d / "model.safetensors", lambda h: h[DOWN].update(shape=[-32, -64])),
        "makes no sense",
    ),
    "unknown dtype": (
        lambda d: with_header(d / "model.safetensors", lambda h: h[DOWN].update(dtype="F128")),
        "makes no sense",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_message_that_names_the_file(damage: str, model_dir: Path) -> None:
    change, message = DAMAGE[damage]
    change(model_dir)
    with pytest.raises(UserError, match=message) as error:
        load_model(model_dir)
    assert str(model_dir) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_an_error_or_harmless(at: int, value: int, model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    raw = path.read_bytes()
    try:
        path.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
        read_header(path)
        load_model(model_dir)
    except UserError as error:
        message = str(error)
    else:
        message = str(model_dir)
    finally:
        path.write_bytes(raw)
    assert str(model_dir) in message


def test_what_cannot_be_loaded_into_is_said(model_dir: Path) -> None:
    with pytest.raises(UserError, match="dtype 'int8' is not supported; these are: float32"):
        load_model(model_dir, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            load_model(model_dir, device="cuda")


def test_a_dtype_or_device_that_there_is_not_is_named(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"dtype torch\.int8 is not supported"):
        load_model(model_dir, dtype=torch.int8)
    for device in ("gpu", "cuda:x"):
        with pytest.raises(UserError, match=f"device '{device}' is not known"):
            load_model(model_dir, device=device)


def test_tensors_that_share_bytes_are_refused(model_dir: Path) -> None:
    """A file of a few bytes could otherwise say that it is a model of any size."""

    def overlap(header: dict[str, Any]) -> None:
        first, second = (n for n in header if n.endswith(("0.mlp.up_proj.weight", "0.mlp.gate_proj.weight")))
        header[second]["data_offsets"] = header[first]["data_offsets"]

    with_header(model_dir / "model.safetensors", overlap)
    with pytest.raises(UserError, match="overlap"):
        load_model(model_dir)


def test_an_unknown_kind_of_weights_is_named(model_dir: Path) -> None:
    with pytest.raises(UserError, match="quantize 'int3' is not supported; these are: none, nf4, int8"):
        load_model(model_dir, quantize="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_while_it_is_read_is_quantized_after_loading(model_dir: Path, kind: Any) -> None:
    """The same bits, with the linear weights of the blocks in 4 or 8 and everything else plain."""
    loaded, after = load_model(model_dir, "bfloat16", quantize=kind), load_model(model_dir, "bfloat16")
    names = quantize_base(after.requires_grad_(False), kind=kind)
    quantized = [name for name, p in loaded.named_parameters() if isinstance(p, QUANTIZED[kind])]
    assert quantized == [f"{name}.weight" for name in names]
    assert not any(loaded.get_parameter(name).requires_grad for name in quantized)
    assert not isinstance(loaded.embed.weight, QuantizedTensor)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens), after(tokens))
