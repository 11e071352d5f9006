"""What every kind of quantized weight promises: gradients, and life as a tensor in torch's modules."""

import copy
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ropewalk.errors import UserError
from ropewalk.ops import (
    Int8Tensor,
    Linear,
    NF4Tensor,
    QuantizedTensor,
    lora_linear,
    lora_linear_reference,
    quantized,
    references,
)
from ropewalk.ops.quantized import dense


@pytest.fixture(params=[NF4Tensor, Int8Tensor])
def kind(request):
    return request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(kind, bad):
    tensor = draw(100, 3)
    tensor[50, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        kind.quantize(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_lora_equal_the_dequantized_weight(kind, dtype, bias):
    """Values and gradients bit for bit: the same products of the same values."""
    weight = kind.quantize(draw(48, 96, dtype=dtype))
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


def test_a_small_model_learns_the_same_as_with_dequantized_weights(kind):
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

    for mine, other in zip(train(kind.quantize), train(lambda w: kind.quantize(w).dequantize()), strict=True):
        assert torch.equal(mine, other)


def test_no_dequantized_weight_is_kept(kind):
    weights = [kind.quantize(draw(64, 64, seed=i)) for i in range(4)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = draw(2, 64).requires_grad_()
        for weight in weights:
            out = F.linear(out, weight)
    assert all(isinstance(t, QuantizedTensor) for t in kept)
    assert dense(weights[0]).data_ptr() == dense(weights[1]).data_ptr()  # one buffer for all


def test_saved_and_loaded(kind):
    layer = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(kind.quantize(draw(40, 96, dtype=torch.bfloat16)), requires_grad=False)
    assert isinstance(layer.weight, kind)
    state = layer.state_dict()
    assert isinstance(state["weight"], kind)
    other = copy.deepcopy(layer)
    other.weight.copy_(draw(40, 96, seed=7))
    assert not torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    other.load_state_dict(state)
    assert torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    plain = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
    plain.load_state_dict(state)  # into 16 bits: dequantized
    assert torch.equal(plain.weight, layer.weight.dequantize())


def test_moves_and_conversions(kind):
    packed = kind.quantize(draw(40, 96))
    assert packed.to("meta").codes.is_meta
    half = nn.ParameterList([nn.Parameter(packed, requires_grad=False)]).bfloat16()[0]
    assert (type(half), half.dtype) == (kind, torch.bfloat16)
    assert torch.equal(half.codes, packed.codes)
    assert torch.equal(half.dequantize(), packed.dequantize().bfloat16())
    copied = packed.clone()
    copied.copy_(torch.zeros(40, 96))
    assert packed.dequantize().any()
    assert not copied.dequantize().any()
    with pytest.raises(NotImplementedError, match="dequantize"):
        packed + 1


def test_decoding_layer_takes_it(kind):
    layer = Linear(96, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight = nn.Parameter(kind.quantize(layer.weight), requires_grad=False)
    row = draw(1, 1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(row), F.linear(row, layer.weight.dequantize()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_works_in_compiled_code(kind, backend):
    weight = nn.Parameter(kind.quantize(draw(48, 64)), requires_grad=False)
    x, a, b = (draw(*s, seed=i).requires_grad_() for i, s in enumerate([(5, 64), (2, 64), (48, 2)]))

    def step(x):
        return (lora_linear(torch.relu(x), weight, None, a, b, 0.5).sin() + F.linear(x, weight)).sum()

    expected = torch.autograd.grad(step(x), (x, a, b))
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), (x, a, b)), expected)


def test_fake_tensors_leave_nothing_behind(kind):
    """A model's memory may be estimated on fake tensors before it runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, x = kind.quantize(draw(200, 700)), draw(3, 700)
    with FakeTensorMode() as mode:
        out = F.linear(mode.from_tensor(x), mode.from_tensor(weight))
        assert out.shape == (3, 200)
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))


def shard_and_step(rank: int, port: int, kind: type[QuantizedTensor]) -> None:
    """One of two processes: sharded layers give the whole ones' results and gradients, twice."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)  # forked: the threads of before are not here

    class Layer(nn.Module):
        def __init__(self, columns: int, rows: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(kind.quantize(draw(rows, columns)), requires_grad=False)
            self.a, self.b = nn.Parameter(draw(4, columns)), nn.Parameter(draw(rows, 4))

        def forward(self, x):
            return lora_linear(x, self.weight, None, self.a, self.b, 0.5).clone()

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        sizes = [(576, 192), (192, 64), (64, 512)]  # for NF4 groups of 256 blocks, and of fewer
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
def test_fully_shard_over_two_processes(kind):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, so that the processes need not find this file as a module
    torch.multiprocessing.start_processes(shard_and_step, (port, kind), nprocs=2, start_method="fork")


def test_a_buffer_made_while_generating_serves_training(kind, monkeypatch):
    monkeypatch.setattr(quantized, "_buffers", threading.local())
    weight = kind.quantize(torch.randn(64, 64))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        first = F.linear(x, weight)
    assert torch.equal(F.linear(x.requires_grad_(), weight), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_and_reads_the_same_codes(kind, dtype):
    values = draw(96, 200, dtype=dtype)
    here, there = kind.quantize(values), kind.quantize(values.cuda())
    moved = here.cuda()
    for name, part in here.parts().items():
        made = there.parts()[name].cpu()
        if made.dtype == torch.int8:  # a quotient at the middle between two codes, rounded otherwise
            apart = (made.int() - part.int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 1e-3
        else:
            torch.testing.assert_close(made, part, rtol=1e-6, atol=0)
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
