"""NF4: the paper's data type, bitsandbytes' codes and values, gradients, and life as a tensor."""

import copy
import os
import threading
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ropewalk.errors import UserError
from ropewalk.ops import Linear, NF4Tensor, lora_linear, lora_linear_reference, nf4, references
from ropewalk.ops.nf4 import dense
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
    scales = []
    for group in groups:
        wide = group.abs().amax().clamp(min=1e-38)
        scales.append(scale_levels[(group / wide)[:, None].sub(scale_levels).abs().argmin(1)] * wide + offset)
    nearest = (flat / absmax.clamp(min=1e-38)[:, None])[..., None].sub(levels).abs().argmin(-1)
    exact = (levels[nearest] * torch.cat(scales)[:, None]).flatten()[: tensor.numel()].view(shape)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        packed.dequantize().double(), exact, rtol=tolerance, atol=1e-6 * factor, check_dtype=False
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(bad):
    tensor = draw(100, 3)
    tensor[50, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        NF4Tensor.quantize(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_lora_equal_the_dequantized_weight(dtype, bias):
    """Values and gradients bit for bit: the same products of the same values."""
    weight = NF4Tensor.quantize(draw(48, 96, dtype=dtype))
    values = weight.dequantize()
    x, a, b = (
        draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate([(3, 7, 96), (4, 96), (48, 4)])
    )
    vector = draw(48, seed=9, dtype=dtype).requires_grad_() if bias else None
    slope = draw(3, 7, 48, seed=5, dtype=dtype)

    def run(function, *leaves):
        out = function()
        return out, *torch.autograd.grad(out, leaves, slope)

    leaves = (x, vector) if bias else (x,)
    ours = run(lambda: F.linear(x, weight, vector), *leaves)
    theirs = run(lambda: F.linear(x, values, vector), *leaves)
    frozen = None if vector is None else vector.detach()
    ours += run(lambda: lora_linear(x, weight, frozen, a, b, 0.5), x, a, b)
    theirs += run(lambda: lora_linear(x, values, frozen, a, b, 0.5), x, a, b)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    with references():
        plain = run(lambda: F.linear(x, weight, vector), *leaves)
        plain += run(lambda: lora_linear(x, weight, frozen, a, b, 0.5), x, a, b)
    direct = run(lambda: lora_linear_reference(x, weight, frozen, a, b, 0.5), x, a, b)
    for mine, other in zip(plain[len(leaves) + 1 :], direct, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(ours, plain, strict=True):
        assert (mine - other).double().norm() <= 20 * torch.finfo(dtype).eps * other.double().norm()


def test_a_small_model_learns_the_same_as_with_dequantized_weights():
    def train(make):
        layers = [make(draw(32, 64, seed=1)), make(draw(16, 32, seed=2))]
        adapters = [(draw(2, 64, seed=3), torch.zeros(32, 2)), (draw(2, 32, seed=4), torch.zeros(16, 2))]
        leaves = [t.requires_grad_() for pair in adapters for t in pair]
        for _ in range(3):
            hidden = draw(8, 64, seed=5)
            for weight, (a, b) in zip(layers, adapters, strict=True):
                hidden = torch.tanh(lora_linear(hidden, weight, None, a, b, 1.0))
            for leaf, grad in zip(leaves, torch.autograd.grad(hidden.square().sum(), leaves), strict=True):
                leaf.data -= 0.01 * grad
        return leaves

    for mine, other in zip(
        train(NF4Tensor.quantize), train(lambda w: NF4Tensor.quantize(w).dequantize()), strict=True
    ):
        assert torch.equal(mine, other)


def test_no_dequantized_weight_is_kept():
    weights = [NF4Tensor.quantize(draw(64, 64, seed=i)) for i in range(4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = draw(2, 64).requires_grad_()
        for weight in weights:
            out = F.linear(out, weight)
    assert all(isinstance(t, NF4Tensor) for t in kept)
    assert dense(weights[0]).data_ptr() == dense(weights[1]).data_ptr()  # one buffer for all


def test_saved_and_loaded():
    layer = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(NF4Tensor.quantize(draw(40, 96, dtype=torch.bfloat16)), requires_grad=False)
    assert isinstance(layer.weight, NF4Tensor)
    state = layer.state_dict()
    assert isinstance(state["weight"], NF4Tensor)
    other = copy.deepcopy(layer)
    other.weight.copy_(draw(40, 96, seed=7))
    assert not torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    other.load_state_dict(state)
    assert torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    plain = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    plain.load_state_dict(state)  # into 16 bits: dequantized
    assert torch.equal(plain.weight, layer.weight.dequantize())


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


def test_moves_and_conversions():
    packed = NF4Tensor.quantize(draw(40, 96))
    assert packed.to("meta").codes.is_meta
    half = nn.ParameterList([nn.Parameter(packed, requires_grad=False)]).bfloat16()[0]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.codes, packed.codes)
    assert torch.equal(half.dequantize(), packed.dequantize().bfloat16())
    copied = packed.clone()
    copied.copy_(torch.zeros(40, 96))
    assert packed.dequantize().any()
    assert not copied.dequantize().any()
    with pytest.raises(NotImplementedError, match="dequantize"):
        packed + 1


def test_pieces_are_whole_blocks():
    packed = NF4Tensor.quantize(draw(9, 64))
    for piece, expected in zip(packed.chunk(3), packed.dequantize().chunk(3), strict=True):
        assert torch.equal(piece.dequantize(), expected)
    with pytest.raises(UserError, match="shared out equally"):
        packed.chunk(2)
    with pytest.raises(UserError, match="whole blocks of 64"):
        NF4Tensor.quantize(draw(4, 40)).chunk(2)


def test_decoding_layer_takes_it():
    layer = Linear(96, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(NF4Tensor.quantize(layer.weight), requires_grad=False)
    row = draw(1, 1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(row), F.linear(row, layer.weight.dequantize()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_works_in_compiled_code(backend):
    weight = nn.Parameter(NF4Tensor.quantize(draw(48, 64)), requires_grad=False)
    x, a, b = (draw(*s, seed=i).requires_grad_() for i, s in enumerate([(5, 64), (2, 64), (48, 2)]))

    def step(x):
        return (lora_linear(torch.relu(x), weight, None, a, b, 0.5).sin() + F.linear(x, weight)).sum()

    expected = torch.autograd.grad(step(x), (x, a, b))
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), (x, a, b)), expected)


def test_fake_tensors_leave_nothing_behind():
    """A model's memory may be estimated on fake tensors before it runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, x = NF4Tensor.quantize(draw(200, 700)), draw(3, 700)
    with FakeTensorMode() as mode:
        out = F.linear(mode.from_tensor(x), mode.from_tensor(weight))
        assert out.shape == (3, 200)
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))


def shard_and_step(rank: int, port: int) -> None:
    """One of two processes: sharded layers give the whole ones' results and gradients, twice."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    class Layer(nn.Module):
        def __init__(self, columns: int, rows: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(NF4Tensor.quantize(draw(rows, columns)), requires_grad=False)
            self.a, self.b = nn.Parameter(draw(4, columns)), nn.Parameter(draw(rows, 4))

        def forward(self, x):
            return lora_linear(x, self.weight, None, self.a, self.b, 0.5).clone()

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        sizes = [(576, 192), (192, 64), (64, 512)]  # groups of 256 blocks, and of fewer
        sharded = nn.Sequential(*(Layer(*size) for size in sizes))
        whole = copy.deepcopy(sharded)
        for layer in sharded:
            fully_shard(layer)
        fully_shard(sharded)
        assert sharded[0].weight.to_local().shape == (96, 576)
        x = draw(8, 576)
        for _ in range(2):
            mine, other = sharded(x), whole(x)
            assert torch.equal(mine, other)
            mine.sum().backward()
            other.sum().backward()
        for layer, reference in zip(sharded, whole, strict=True):
            torch.testing.assert_close(layer.a.grad.full_tensor(), reference.a.grad)
            local = layer.state_dict()["weight"].to_local().dequantize()
            assert torch.equal(local, reference.weight.dequantize().chunk(2)[rank])
        with pytest.raises(UserError, match="shared out equally"):
            fully_shard(Layer(64, 3))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fully_shard_over_two_processes():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, so that the processes need not find this file as a module
    torch.multiprocessing.start_processes(shard_and_step, (port,), nprocs=2, start_method="fork")


def test_a_buffer_made_while_generating_serves_training(monkeypatch):
    monkeypatch.setattr(nf4, "_buffers", threading.local())
    weight = NF4Tensor.quantize(torch.randn(64, 64))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        first = F.linear(x, weight)
    assert torch.equal(F.linear(x.requires_grad_(), weight), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_and_reads_the_same_codes(dtype):
    values = draw(96, 200, dtype=dtype)
    here, there = NF4Tensor.quantize(values), NF4Tensor.quantize(values.cuda())
    moved = here.cuda()
    for name, part in here.parts().items():
        torch.testing.assert_close(there.parts()[name].cpu(), part, rtol=1e-6, atol=0)
        assert torch.equal(moved.parts()[name].cpu(), part)
    assert torch.equal(moved.dequantize().cpu(), here.dequantize())
    x, a, b = draw(5, 200, dtype=dtype), draw(4, 200, seed=1, dtype=dtype), draw(96, 4, seed=2, dtype=dtype)
    ends = []
    for device, weight in (("cpu", here), ("cuda", moved)):
        inputs = [t.to(device).requires_grad_() for t in (x, a, b)]
        out = lora_linear(inputs[0], weight, None, *inputs[1:], 0.5)
        ends.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for far, near in zip(ends[1], ends[0], strict=True):
        error = (far.cpu() - near).float().norm() / near.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
