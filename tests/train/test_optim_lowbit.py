"""optim_lowbit: states in 8 and 4 bits against torchao's, and rounding at random that is right on average."""

import math

import pytest
import torch
from torch import Tensor, nn

from ropewalk.train.optim import Optimizer, OptimizerConfig
from ropewalk.train.optim_lowbit import BLOCK, LowBitState, code_values, stochastic_round

COUNT = 64 * 256
CPU = torch.device("cpu")
FORMATS = [(8, True), (8, False), (4, True), (4, False)]


def numbers(signed: bool, seed: int = 0) -> Tensor:
    """Over 12 decades, as second moments are; blocks of different size; one block of zeros."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(COUNT, generator=random) * 10 ** (torch.rand(COUNT, generator=random) * -12)
    drawn[256:512] = 0.0
    return drawn if signed else drawn.abs()


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_each_number_gets_the_nearest_code(bits: int, signed: bool) -> None:
    """Against a search through all codes, in float64."""
    state = LowBitState(COUNT, bits, signed, CPU)
    given = numbers(signed)
    state.write(0, COUNT, given)
    blocks = given.double().view(-1, BLOCK[bits])
    scale = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(code_values(bits, signed)).double()
    distance = (blocks.unsqueeze(-1) / scale.clamp(min=1e-12).unsqueeze(-1) - values).abs()
    kept = state.read(0, COUNT).double().view_as(blocks)
    error = (kept - blocks).abs() / scale.clamp(min=1e-12)
    filled = scale.squeeze() > 0
    torch.testing.assert_close(error[filled], distance.amin(-1)[filled], atol=1e-6, rtol=1e-5)
    assert (kept[~filled].abs() < 1e-12).all()


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_codes_are_those_of_torchao(bits: int, signed: bool) -> None:
    optim = pytest.importorskip("torchao.optim.subclass_8bit" if bits == 8 else "torchao.optim.subclass_4bit")
    theirs = (optim.OptimState8bit if bits == 8 else optim.OptimState4bit).zeros((COUNT,), signed)
    torch.testing.assert_close(torch.tensor(code_values(bits, signed)), theirs.qmap)
    state = LowBitState(COUNT, bits, signed, CPU)
    given = numbers(signed)
    theirs.copy_(given)
    state.write(0, COUNT, given)
    assert torch.equal(state.scale, theirs.scale)
    different = (state.codes != theirs.codes).float().mean()
    assert different < 1e-3  # numbers in the very middle of two codes, whose middle is rounded otherwise
    state.codes.copy_(theirs.codes)
    torch.testing.assert_close(state.read(0, COUNT), theirs.dequantize())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_of_blocks_is_as_the_whole(bits: int) -> None:
    whole, parts = LowBitState(COUNT, bits, True, CPU), LowBitState(COUNT, bits, True, CPU)
    given = numbers(True)
    whole.write(0, COUNT, given)
    for start in range(0, COUNT, 1024):
        parts.write(start, start + 1024, given[start : start + 1024])
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.read(512, 2048), whole.read(0, COUNT)[512:2048])


class Line(nn.Module):
    """A matrix large enough for few bits, and a bias that is not, fitted to a linear map."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 128)
        self.to(dtype)

    def loss(self, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 64, generator=random).to(self.inner.weight.dtype)
        wanted = x.repeat(1, 2) * 0.5 + 0.1
        return nn.functional.mse_loss(self.inner(x).float(), wanted.float())


@pytest.mark.parametrize(("bits", "within"), [(8, 2e-4), (4, 3e-4)])
def test_steps_are_those_of_torchao(bits: int, within: float) -> None:
    """20 steps of AdamW by their function in eager mode; some codes are one apart."""
    adam = pytest.importorskip("torchao.optim.adam")
    mine, other = Line(), Line()
    optimizer = Optimizer(mine, OptimizerConfig(weight_decay=0.1, state_bits=bits))  # type: ignore[arg-type]
    zeros = adam.AdamW8bit._subclass_zeros if bits == 8 else adam.AdamW4bit._subclass_zeros
    block = BLOCK[bits]
    states = {
        name: (zeros(p.detach(), True, block), zeros(p.detach(), False, block))
        if p.numel() >= 4096
        else (torch.zeros_like(p), torch.zeros_like(p))
        for name, p in other.named_parameters()
    }
    for step in range(1, 21):
        mine.loss(step).backward()
        optimizer.step(1e-2)
        other.zero_grad()
        other.loss(step).backward()
        for name, p in other.named_parameters():
            decay = 0.1 if p.ndim > 1 else 0.0
            adam.single_param_adam(
                p.detach(),
                p.grad,
                torch.tensor(float(step)),
                *states[name],
                None,
                torch.tensor(1e-2),
                0.9,
                0.95,
                decay,
                1e-8,
                True,
                False,
            )
    moved = (mine.inner.weight - Line().inner.weight).abs().mean()
    assert moved > 0.02
    assert (mine.inner.weight - other.inner.weight).abs().mean() < within
    assert set(optimizer.state_tensors()) == {
        "master.inner.weight",
        "step.inner.weight",
        "exp_avg_codes.inner.weight",
        "exp_avg_scale.inner.weight",
        "exp_avg_sq_codes.inner.weight",
        "exp_avg_sq_scale.inner.weight",
        "master.inner.bias",
        "step.inner.bias",
        "exp_avg.inner.bias",
        "exp_avg_sq.inner.bias",
    }


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_learn_as_well(name: str, bits: int) -> None:
    """200 steps take the loss to a fiftieth, with 32 bits to a hundredth or less."""
    losses = {}
    for state_bits in (32, bits):
        model = Line()
        config = OptimizerConfig(name, betas=(0.9, 0.99), state_bits=state_bits)  # type: ignore[arg-type]
        optimizer = Optimizer(model, config)
        first = model.loss(0).item()
        for step in range(200):
            loss = model.loss(step)
            loss.backward()
            optimizer.step(1e-2 * (1 - step / 200))
        losses[state_bits] = loss.item()
    assert losses[32] < first / 100
    assert losses[bits] < first / 50


def test_bytes_are_counted_as_they_are() -> None:
    """A float32 weight costs 8 bytes of state in 32 bits, 2 in 8 and 1 in 4, and scales per block."""
    for bits, each in ((32, 8.0), (8, 2 + 8 / 256), (4, 1 + 8 / 128)):
        model = Line()
        optimizer = Optimizer(model, OptimizerConfig(state_bits=bits))  # type: ignore[arg-type]
        model.loss(0).backward()
        assert optimizer.state_bytes() == 4 * (64 * 128 + 128)  # the gradients
        optimizer.step(0.0)
        bias = 8 * 128
        steps = 2 * 4
        assert optimizer.state_bytes() == round(64 * 128 * each) + bias + steps
    model = Line(torch.bfloat16)
    assert Optimizer(model, OptimizerConfig()).state_bytes() == 4 * (64 * 128 + 128)  # the masters
    lean = Optimizer(Line(torch.bfloat16), OptimizerConfig(masters=False))
    assert lean.state_bytes() == 0


def test_rounding_at_random_is_right_on_average() -> None:
    """10,000 roundings of numbers between two of bfloat16: to these two, and their mean is the number."""
    given = torch.tensor([1.0 + 2**-9, -3.14159, 1e-30, -7e10, 0.1])
    draws, target = 10_000, torch.empty(5 * 10_000, dtype=torch.bfloat16)
    stochastic_round(given.repeat(draws), target, (1, 2))
    drawn = target.double().view(draws, 5)
    down = (given.view(torch.int32) & -65536).view(torch.float32).double()
    up = ((given.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert ((drawn == down) | (drawn == up)).all()
    spread = (up - down).abs() / 2 / math.sqrt(draws)
    assert ((drawn.mean(0) - given.double()).abs() < 4 * spread).all()


def test_rounding_keeps_what_bfloat16_can_hold() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch.bfloat16)
    exact = exact[~exact.isnan()]
    target = torch.empty_like(exact)
    stochastic_round(exact.float(), target, (0,))
    assert torch.equal(target.view(torch.int16), exact.view(torch.int16))


def test_rounding_keeps_nan() -> None:
    """Also one with all bits set, as a GPU makes it, and one whose bits are all cut off."""
    nan = torch.tensor([2**31 - 1, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(1000)
    target = torch.empty(3000, dtype=torch.bfloat16)
    stochastic_round(nan, target, (0,))
    assert target.isnan().all()


def test_draws_depend_on_the_seed_only_and_are_independent() -> None:
    given = torch.full((4099,), 1.0 + 2**-8)  # the middle of two
    first, second, other = (torch.empty(4099, dtype=torch.bfloat16) for _ in range(3))
    stochastic_round(given, first, (3, 1, 0, 0))
    torch.manual_seed(99)
    stochastic_round(given, second, (3, 1, 0, 0))
    stochastic_round(given, other, (3, 2, 0, 0))
    assert torch.equal(first, second)
    ups = [(drawn > 1).double() for drawn in (first, other)]
    assert abs(float(ups[0].mean()) - 0.5) < 0.03
    assert abs(float((ups[0] * ups[1]).mean()) - 0.25) < 0.03
    assert abs(float((ups[0][1:] * ups[0][:-1]).mean()) - 0.25) < 0.03
