"""What is compiled, and what is said where it cannot be."""

import pytest
import torch
from torch import nn

import ropewalk as rw
from ropewalk.errors import UserError
from ropewalk.model import from_config
from ropewalk.train.compiling import compile_blocks, use_float8, worth_float8


def tiny():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return from_config({"model_type": "llama", "vocab_size": 32, **sizes}, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_compiled_run_learns_as_a_plain_one_and_says_what_compiling_took(
    make_recipe, tmp_path, monkeypatch, checkpointing
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    plain = rw.train(make_recipe(steps=3), progress=False)
    compiled = rw.train(make_recipe(steps=3, compile=True, checkpointing=checkpointing), progress=False)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    lines = (compiled.run / "metrics-train.jsonl").read_text().splitlines()
    assert any('"kind": "compile"' in line or '"kind":"compile"' in line for line in lines)
    assert any((tmp_path / "compiled").iterdir())  # for the next process


def test_without_a_compiler_it_says_so(make_recipe, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        compile_blocks(tiny())


def test_float8_is_for_large_trained_layers_of_fitting_sizes():
    with torch.device("meta"):
        large, odd, small = nn.Linear(4096, 4096), nn.Linear(4096, 4100), nn.Linear(1024, 1024)
    assert worth_float8(large)
    assert not worth_float8(odd)
    assert not worth_float8(small)
    assert not worth_float8(large.requires_grad_(False))
    assert not worth_float8(nn.Module())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_float8_without_a_gpu_is_refused():
    with pytest.raises(UserError, match=r"capability 8\.9"):
        use_float8(tiny())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with float8",
)
def test_float8_products_are_close_to_bfloat16_ones():
    pytest.importorskip("torchao")
    shape = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = from_config({**shape, "num_attention_heads": 16, "vocab_size": 64}, seed=0).cuda().bfloat16()
    tokens = torch.arange(64, device="cuda")[None]
    before = model(tokens)
    use_float8(model)
    error = (model(tokens) - before).float().norm() / before.float().norm()
    assert 0 < error < 0.2  # 3 bits of mantissa in each of seven products: 0.11 was seen
