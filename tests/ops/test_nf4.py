"""NF4: the paper's data type, bitsandbytes' codes and values, gradients, and life as a tensor."""

from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.errors import UserError
from ropewalk.ops import NF4Tensor
from ropewalk.ops.nf4_codes import LEVELS, SCALE_LEVELS, plain_values


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_levels_are_the_quantiles_of_the_paper():
    """Appendix E: 8 quantiles of the negative and 9 of the positive half share 0; scaled to [-1, 1]."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    half = [[NormalDist().inv_cdf(end + (0.5 - end) * i / n) for i in range(n)] for n in (7, 8)]
    levels = sorted([-x for x in half[0]] + [0.0] + half[1])
    torch.testing.assert_close(torch.tensor(LEVELS), torch.tensor(levels) / max(levels), atol=1e-6, rtol=0)


def test_codes_and_values_of_one_block_by_hand():
    """The 16 levels times a maximum come back exactly; what lies between goes to the nearest."""
    block = torch.tensor(LEVELS).repeat(4) * 0.5
    packed = NF4Tensor.quantize(block)
    nibbles = torch.stack((packed.codes >> 4, packed.codes & 15), 1).flatten()
    assert nibbles.tolist() == list(range(16)) * 4
    torch.testing.assert_close(packed.dequantize(), block, atol=1e-7, rtol=0)  # one block: its own mean
    moved = block + torch.tensor([0.009, -0.009] * 32)
    moved[[0, 15]] = torch.tensor([-0.5, 0.5])
    assert torch.equal(NF4Tensor.quantize(moved).codes, packed.codes)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    factor=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_definition_in_float64(shape, dtype, factor, seed):
    """Nearest of the levels, times the block's maximum as its 8-bit code holds it: by brute force."""
    tensor = draw(*shape, seed=seed, dtype=dtype) * factor
    packed = NF4Tensor.quantize(tensor)
    assert (packed.shape, packed.dtype) == (tensor.shape, dtype)
    flat = F.pad(tensor.double().flatten(), (0, -tensor.numel() % 64)).view(-1, 64)
    absmax = flat.abs().amax(1)
    offset = absmax.float().mean().double()
    groups = (absmax - offset).split(256)
    levels, scale_levels = torch.tensor(LEVELS).double(), torch.tensor(SCALE_LEVELS).double()
    scales, ties = [], []
    for group in groups:
        wide = group.abs().amax().clamp(min=1e-38)
        distances = (group / wide)[:, None].sub(scale_levels).abs()
        scales.append(scale_levels[distances.argmin(1)] * wide + offset)
        near = distances.topk(2, largest=False).values
        ties.append(near[:, 1] - near[:, 0] < 1e-6)  # either level is right: float32 may find the other
    nearest = (flat / absmax.clamp(min=1e-38)[:, None])[..., None].sub(levels).abs().argmin(-1)
    exact = (levels[nearest] * torch.cat(scales)[:, None]).flatten()[: tensor.numel()].view(shape)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    clear = ~torch.cat(ties).repeat_interleave(64)[: tensor.numel()].view(shape)
    torch.testing.assert_close(
        packed.dequantize().double()[clear],
        exact[clear],
        rtol=tolerance,
        atol=1e-6 * factor,
        check_dtype=False,
    )


def test_chunks_do_not_show_and_the_plain_form_gives_the_same_bits(monkeypatch):
    import ropewalk.ops.nf4_codes as codes

    tensor = draw(300, 333)
    whole = NF4Tensor.quantize(tensor)
    monkeypatch.setattr(codes, "_CPU_CHUNK", 640)
    pieces = NF4Tensor.quantize(tensor)
    for name, part in whole.parts().items():
        assert torch.equal(part, pieces.parts()[name]), name
    plain = plain_values(*whole.parts().values(), whole.group).flatten()[: tensor.numel()].view(tensor.shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(whole.dequantize(dtype=dtype), plain.to(dtype))
        assert torch.equal(whole.dequantize(out=torch.empty(300, 333, dtype=dtype)), plain.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1000, 640), (300, 334)])
def test_equals_bitsandbytes(shape, dtype):
    """Codes are equal; scales but for near ties, which it decides roughly; of its parts, its values."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = draw(*shape, dtype=dtype) * 0.02
    packed = NF4Tensor.quantize(weight)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed.codes[: codes.numel()], codes.flatten())
    assert torch.equal(packed.scale_absmax, state.state2.absmax)
    assert torch.equal(packed.offset, state.offset)
    # it finds the nearest scale by a rough table: ours is never farther from the maximum than its own
    absmax = F.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    wide = packed.scale_absmax.repeat_interleave(256)[: len(absmax)]
    exact, levels = (absmax - packed.offset) / wide, torch.tensor(SCALE_LEVELS)
    mine, other = ((levels[c.int()] - exact).abs() for c in (packed.scale_codes, state.absmax))
    assert (mine <= other + 1e-7).all()
    assert (other <= mine + 5e-5).all()
    assert (packed.scale_codes != state.absmax).float().mean() < 0.005
    theirs = {
        "codes": F.pad(codes.flatten(), (0, packed.codes.numel() - codes.numel())),
        "scale_codes": state.absmax,
        "scale_absmax": state.state2.absmax,
        "offset": state.offset,
    }
    mine = NF4Tensor.from_parts(theirs, shape, dtype)
    assert torch.equal(mine.dequantize(), functional.dequantize_4bit(codes, state))


def test_bytes_are_counted_honestly():
    packed = NF4Tensor.quantize(draw(512, 1024, dtype=torch.bfloat16))
    assert packed.nbytes == 512 * 1024 // 2 + 512 * 1024 // 64 + 4 * 32 + 4
    assert packed.nbytes * 8 / packed.numel() == pytest.approx(4.127, abs=0.001)
    assert NF4Tensor.quantize(torch.zeros(0, 5)).dequantize().shape == (0, 5)


def test_parts_go_through_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    packed = NF4Tensor.quantize(draw(100, 300))
    save_file(packed.parts(), tmp_path / "parts.safetensors")
    parts = load_file(tmp_path / "parts.safetensors")
    again = NF4Tensor.from_parts(parts, (100, 300), torch.float32)
    assert torch.equal(again.dequantize(), packed.dequantize())
    half = packed[:48]  # in smaller groups, which the parts' sizes tell
    assert half.group < 256
    again = NF4Tensor.from_parts(half.parts(), (48, 300), torch.float32)
    assert torch.equal(again.dequantize(), packed.dequantize()[:48])
    with pytest.raises(UserError, match="do not make a tensor of shape"):
        NF4Tensor.from_parts(parts, (100, 301), torch.float32)
    with pytest.raises(UserError, match="do not make"):
        NF4Tensor.from_parts(parts | {"codes": parts["codes"].int()}, (100, 300), torch.float32)


def test_pieces_are_whole_blocks():
    packed = NF4Tensor.quantize(draw(9, 64))
    for piece, expected in zip(packed.chunk(3), packed.dequantize().chunk(3), strict=True):
        assert torch.equal(piece.dequantize(), expected)
    with pytest.raises(UserError, match="shared out equally"):
        packed.chunk(2)
    with pytest.raises(UserError, match="whole blocks of 64"):
        NF4Tensor.quantize(draw(4, 40)).chunk(2)
