"""Int8: the definition, torchao's codes, and pieces that are those of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.ops import Int8Tensor, int8


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    factor=st.sampled_from([0.0, 1e-44, 1e-6, 0.02, 1.0, 1e4, 1e38]),
    seed=st.integers(0, 99),
)
def test_any_shape_is_within_half_a_step(shape, dtype, factor, seed):
    """A step is a row's largest value / 127, which is held exactly: in float64, and rounded to the dtype."""
    tensor = draw(*shape, seed=seed, dtype=dtype) * (factor / 5)  # no overflow of float32
    packed = Int8Tensor.quantize(tensor)
    assert (packed.shape, packed.dtype) == (tensor.shape, dtype)
    rows = tensor.double().reshape(shape[0] if len(shape) > 1 else 1, -1)
    largest = rows.abs().amax(1, keepdim=True)
    steps = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    found = packed.dequantize(dtype=torch.float64).view(rows.shape)
    assert ((found - rows).abs() <= steps * (0.5 + 1e-4)).all()
    assert (packed.codes.abs().amax(1) == 127)[largest.flatten() > 1e-36].all()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        packed.dequantize().double().view(rows.shape), found, rtol=rounding, atol=1e-40, check_dtype=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1000, 640), (7, 333)])
def test_equals_torchao(shape, dtype):
    """Its rowwise quantization for training; it multiplies by reciprocals: some ties fall otherwise."""
    training = pytest.importorskip("torchao.prototype.quantized_training.int8")
    weight = draw(*shape, dtype=dtype) * 0.02
    packed = Int8Tensor.quantize(weight)
    codes, scales = training.quantize_int8_rowwise(weight.float())
    assert torch.equal(packed.scales, scales.flatten())
    assert torch.equal(packed.dequantize(), (packed.codes.float() * scales.view(-1, 1)).to(dtype))
    other = packed.codes != codes
    exact = weight.double()[other] / scales.double().view(-1, 1).expand(shape)[other]
    torch.testing.assert_close((exact - exact.floor()), torch.full_like(exact, 0.5), rtol=0, atol=1e-5)
    assert other.float().mean() < 0.02


def test_chunks_do_not_show(monkeypatch):
    tensor = draw(300, 333)
    tensor[7] = 0
    whole = Int8Tensor.quantize(tensor)
    values = whole.dequantize()
    monkeypatch.setattr(int8, "_CPU_CHUNK", 640)
    pieces = Int8Tensor.quantize(tensor)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        expected = (whole.codes.float() * whole.scales[:, None]).to(dtype)
        assert torch.equal(whole.dequantize(dtype=dtype), expected)
        assert torch.equal(whole.dequantize(out=torch.empty(300, 333, dtype=dtype)), expected)
    assert torch.equal(whole.dequantize(), values)
    assert not values[7].any()


def test_bytes_are_counted_honestly():
    packed = Int8Tensor.quantize(draw(512, 1024, dtype=torch.bfloat16))
    assert packed.nbytes == 512 * 1024 + 4 * 512
    assert Int8Tensor.part_bytes((512, 1024)) == (512 * 1024, 4 * 512)
    assert Int8Tensor.quantize(torch.zeros(0, 5)).dequantize().shape == (0, 5)


@pytest.mark.parametrize("width", [64, 5])
def test_pieces_have_the_values_of_the_whole(width):
    """Rows and columns of any number: what sharding and divided products take."""
    packed = Int8Tensor.quantize(draw(9, width))
    values = packed.dequantize()
    for piece, expected in zip(packed.chunk(3), values.chunk(3), strict=True):
        assert torch.equal(piece.dequantize(), expected)
    assert torch.equal(packed[2:4].dequantize(), values[2:4])
    assert torch.equal(packed.columns(1, 3).dequantize(), values[:, 1:4])
    assert torch.equal(packed.view(-1).dequantize(), values.view(-1))
    with pytest.raises(UserError, match="shared out equally"):
        packed.chunk(2)
    with pytest.raises(UserError, match="whole blocks"):
        packed.view(-1)[1:]


def test_parts_go_through_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    packed = Int8Tensor.quantize(draw(100, 30))
    save_file(packed.parts(), tmp_path / "parts.safetensors")
    parts = load_file(tmp_path / "parts.safetensors")
    again = Int8Tensor.from_parts(parts, (100, 30), torch.float32)
    assert torch.equal(again.dequantize(), packed.dequantize())
    with pytest.raises(UserError, match="do not make a tensor of shape"):
        Int8Tensor.from_parts(parts, (100, 31), torch.float32)
    with pytest.raises(UserError, match="do not make"):
        Int8Tensor.from_parts(parts | {"codes": parts["codes"].int()}, (100, 30), torch.float32)
