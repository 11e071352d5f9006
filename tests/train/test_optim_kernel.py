"""The Triton kernel of AdamW keeps what its rule promises: on a GPU, and in Triton's interpreter."""

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from ropewalk.train import optim_rules
from ropewalk.train.optim import Optimizer, OptimizerConfig
from ropewalk.train.optim_lowbit import LowBitState

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
BETA1, BETA2, EPSILON, RATE, DECAY, SCALE = 0.9, 0.95, 1e-8, 0.01, 0.1, 0.5


class One(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def start(weight: Tensor, seed: int = 0, **settings: Any) -> tuple[One, Optimizer]:
    config = OptimizerConfig(**{"weight_decay": DECAY, "betas": (BETA1, BETA2), **settings})
    model = One(weight)
    return model, Optimizer(model, config, seed=seed)


def step(model: One, optimizer: Optimizer, *gradients: Tensor, rate: float = RATE) -> None:
    """An update by the kernel, from a gradient for each micro-batch."""
    from ropewalk.train import optim_kernel

    for gradient in gradients:
        optimizer._slots["weight"].add(gradient)
    optimizer.scale_gradients(SCALE)
    with patch.object(optim_kernel, "update_slot", wraps=optim_kernel.update_slot) as calls:
        optimizer.step(rate)
    assert calls.call_count == 1
    assert optimizer.gradients() == {}


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Exact:
    """arXiv 1711.05101, algorithm 2, in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double()
        self.m, self.v, self.t = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def step(self, gradient: Tensor) -> None:
        g = gradient.double() * SCALE
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g * g
        root = (self.v / (1 - BETA2**self.t)).sqrt() + EPSILON
        direction = self.m / (1 - BETA1**self.t) / root
        self.weight = self.weight - RATE * DECAY * self.weight - RATE * direction


def masters(device: str) -> None:
    """Masters and states are those of float64, of any size, from gradients in 16 and 32 bits; the weight is
    the master rounded."""
    for dtype, shape in ((torch.bfloat16, (5, 819)), (torch.float16, (1, 7)), (torch.bfloat16, (1, 1025))):
        model, optimizer = start(random(*shape, device=device).to(dtype))
        exact = Exact(model.weight.detach())
        for t in range(1, 5):
            gradients = [random(*shape, seed=t + 10 * i, device=device).to(dtype) for i in range(1 + t % 2)]
            with patch.object(optim_rules, "_has_kernel", lambda _: True):  # torch's does as well here
                step(model, optimizer, *gradients)
            exact.step(torch.stack(gradients).float().sum(0))
        state = optimizer.state_tensors()
        for kind, expected in (("master", exact.weight), ("exp_avg", exact.m), ("exp_avg_sq", exact.v)):
            torch.testing.assert_close(
                state[f"{kind}.weight"].double(), expected, rtol=1e-5, atol=1e-6, msg=kind
            )
        master, weight = state["master.weight"], model.weight.detach()
        if device == "cuda" or dtype == torch.float16:
            assert torch.equal(weight, master.to(dtype))
        else:  # the interpreter cuts where a GPU rounds
            assert ((weight.float() - master).abs() <= master.abs() / 128).all()


def neighbours(device: str) -> None:
    """Without a master a weight is one of the two bfloat16 numbers around the result of float64; what is
    beside it in memory stays as it is."""
    around = torch.full((3 * 700 + 50,), 5.0, dtype=torch.bfloat16, device=device)
    model, optimizer = start(around[:-50].view(3, 700), masters=False)
    model.weight.data.copy_(random(3, 700))
    exact = Exact(model.weight.detach())
    for t in range(1, 4):
        exact.weight = model.weight.detach().double()
        gradient = random(3, 700, seed=t, device=device).bfloat16()
        step(model, optimizer, gradient)
        exact.step(gradient)
        cut = (exact.weight.float().view(torch.int32) & -65536).view(torch.float32)
        after = (cut.view(torch.int32) + 65536).view(torch.float32)
        found = model.weight.detach().double()
        right = (found == cut) | (found == after) | ((found - exact.weight).abs() < 1e-6)
        assert right.all()
        assert 0.3 < (found == cut).double().mean() < 0.7
    assert (around[-50:] == 5.0).all()


def draws(device: str) -> None:
    """Three of ten weights are rounded down where the result is three tenths below; neighbours near and far,
    steps and seeds do not draw alike; a run that goes on from its state draws as one that never stopped."""
    ones, below = torch.ones(64, 256, dtype=torch.bfloat16, device=device), 2**-8

    def settled(seed: int) -> tuple[One, Optimizer]:
        model, optimizer = start(ones.clone(), seed, masters=False, weight_decay=0.0)
        step(model, optimizer, ones, rate=0.3 * below)
        return model, optimizer

    model, optimizer = settled(1)
    weight = model.weight.detach()
    assert ((weight == 1) | (weight == 1 - below)).all()
    down = (weight < 1).double().view(-1)
    others = [(settled(seed)[0].weight < 1).double().view(-1) for seed in (1, 2)]
    assert torch.equal(down, others[0])
    assert abs(float(down.mean()) - 0.3) < 4 * math.sqrt(0.21 / len(down))
    pairs = [(down[lag:], down[: len(down) - lag]) for lag in (1, 2, 3, 4, 8, 256, 1024)]
    for left, right in [*pairs, (down, others[1])]:
        assert abs(float((left * right).mean()) - 0.09) < 4 * math.sqrt(0.09 / len(left))

    saved = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    again, other = start(ones.clone(), 1, masters=False, weight_decay=0.0)
    other.load_state_tensors(saved)
    for one in ((model, optimizer), (again, other)):
        step(*one, ones, rate=0.3 * below)
    assert torch.equal(model.weight, again.weight)
    second = model.weight.detach().view(-1)[down == 0]  # those still at one
    assert abs(float((second < 1).double().mean()) - 0.3) < 4 * math.sqrt(0.21 / len(second))


def kept(device: str) -> None:
    """What bfloat16 can hold stays as it is where nothing moves it, infinities too; and NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if device == "cpu":  # the interpreter does not read the smallest numbers right
        every = every[(every == 0) | every.isnan() | (every.abs() >= 2**-126)]
    model, optimizer = start(every.to(device).view(1, -1), masters=False, weight_decay=0.0)
    before = model.weight.detach().clone()
    step(model, optimizer, torch.zeros_like(before))
    after, number = model.weight.detach(), ~before.isnan()
    assert torch.equal(after.view(torch.int16)[number], before.view(torch.int16)[number])
    assert after[~number].isnan().all()

    worst = torch.full((1, 256), 2**31 - 1, dtype=torch.int32, device=device).view(torch.float32)
    model, optimizer = start(torch.ones(1, 256, dtype=torch.bfloat16, device=device), masters=False)
    step(model, optimizer, worst)  # NaN with all bits set, as a GPU makes it
    assert model.weight.isnan().all()


def few_bits(device: str) -> None:
    """States in 8 bits get the codes and scales that `LowBitState.write` gives; NaN spoils its block only."""
    shape, size = (19, 256), 19 * 256
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = start(random(*shape, device=device).to(dtype), masters=False, state_bits=8)
        plain = [LowBitState(size, 8, signed, torch.device("cpu")) for signed in (True, False)]
        exact = Exact(model.weight.detach())
        for t in range(1, 4):
            spread = 10 ** (torch.rand(shape, generator=torch.Generator().manual_seed(t)) * -6)
            gradient = (random(*shape, seed=t) * spread).to(dtype)
            gradient[1] = 0.0
            if t == 3:
                gradient[2, 7] = torch.nan
            step(model, optimizer, gradient.to(device))
            m, v = (state.read(0, size) for state in plain)
            exact.m, exact.v = (old.view(shape).double().to(device) for old in (m, v))
            exact.step(gradient.to(device))
            g = gradient.float().view(-1) * SCALE
            plain[0].write(0, size, m + (1 - BETA1) * (g - m))
            plain[1].write(0, size, BETA2 * v + (1 - BETA2) * g * g)
            state = {key: tensor.cpu() for key, tensor in optimizer.state_tensors().items()}
            for kind, expected in zip(("exp_avg", "exp_avg_sq"), plain, strict=True):
                codes, scale = state[f"{kind}_codes.weight"], state[f"{kind}_scale.weight"]
                torch.testing.assert_close(scale, expected.scale, rtol=1e-6, atol=0.0, equal_nan=True)
                assert scale.isnan().sum() == (t == 3)
                apart = (codes.int() - expected.codes.int()).abs()[~scale.isnan().repeat_interleave(256)]
                assert apart.max() <= 1
                assert (apart > 0).double().mean() < 1e-3
                expected.codes.copy_(codes)
                expected.scale.copy_(scale)
            finite = ~exact.weight.isnan()
            assert torch.equal(finite, ~model.weight.isnan())
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0}
            torch.testing.assert_close(
                model.weight.detach()[finite].double(), exact.weight[finite], **tolerance
            )
            exact.weight = model.weight.detach().double()


CHECKS = (masters, neighbours, draws, kept, few_bits)


@needs_triton
def test_in_the_interpreter_it_does_what_it_promises(run_as_script: Callable[..., None]) -> None:
    """All checks, in a process of its own: the interpreter is chosen when triton is imported."""
    run_as_script(__file__, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu_it_does_what_it_promises(check: Callable[[str], None]) -> None:
    """Each check, as machine code."""
    check("cuda")


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_that_are_not_here(
    capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, in each of its forms: rounding and masters, states in 32 and 8 bits."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ropewalk.train.optim_kernel import _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide, low = ("*fp32",), ("*u8", "*fp32", "*fp32", "*u8", "*fp32")
    for weight, parameter, gradient, state in (
        ("*bf16", "*bf16", "*bf16", wide),
        ("*bf16", "*bf16", "*fp32", low),
        ("*fp32", "*bf16", "*bf16", low),
        ("*fp32", "*fp16", "*fp16", wide),
    ):
        fixed = {"shows": weight != parameter, "rows": 4, "block": 256}
        types = {"weight": weight, "parameter": parameter, "gradient": gradient, "first": state}
        types |= {"second": state, "count": "i64", "seed": "i64", **dict.fromkeys(fixed, "constexpr")}
        signature = {name: types.get(name, "fp32") for name in _kernel.arg_names}
        source = triton.compiler.ASTSource(fn=_kernel, signature=signature, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize(
    ("dtype", "settings", "expected"),
    [
        (torch.bfloat16, {}, False),
        (torch.bfloat16, {"state_bits": 8}, True),
        (torch.bfloat16, {"masters": False}, True),
        (torch.float32, {"state_bits": 8}, True),
        (torch.float32, {}, False),
        (torch.bfloat16, {"state_bits": 4}, False),
        (torch.bfloat16, {"offload": True}, False),
    ],
)
def test_it_takes_what_is_done_in_pieces_otherwise(
    dtype: torch.dtype, settings: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what torch's kernel does in few passes, not 4 bits, nothing on the host; a CPU has none."""
    monkeypatch.setattr(Optimizer, "_OFFLOADED", ("cpu",))
    _, optimizer = start(torch.ones(16, 256, dtype=dtype), **settings)
    (slot,) = optimizer._slots.values()
    slot.state = optim_rules.first_state("adamw", slot, optimizer.config.state_bits)
    assert not optim_rules._has_kernel(slot)
    monkeypatch.setattr(optim_rules, "_KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(optim_rules, "has_triton", lambda: True)
    assert optim_rules._has_kernel(slot) == expected


if __name__ == "__main__":
    optim_rules._KERNEL_DEVICES = {"cpu"}
    for check in CHECKS:
        check("cpu")
