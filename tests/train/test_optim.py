"""optim: AdamW against its definition, float32 masters, and a state that comes back bit for bit."""

import math

import pytest
import torch
from torch import nn

from ropewalk.train.optim import AdamW, matrix_names


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.embed(tokens)))))


def loss_of(net: Net, seed: int) -> torch.Tensor:
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def test_decay_is_for_matrices_only() -> None:
    assert matrix_names(Net()) == ["inner.weight", "head.weight", "frozen.weight"]


def test_a_tied_head_is_an_embedding() -> None:
    net = Net()
    net.head.weight = net.embed.weight
    assert "head.weight" not in matrix_names(net)
    assert "embed.weight" not in matrix_names(net)


def test_steps_equal_the_definition_in_float64() -> None:
    """arXiv 1711.05101, algorithm 2, written out for one matrix and one bias."""
    net, rate, decay, (b1, b2), eps = Net(), 0.01, 0.1, (0.9, 0.95), 1e-8
    optimizer = AdamW(net, weight_decay=decay, betas=(b1, b2), epsilon=eps)
    expected = {n: p.detach().double() for n, p in net.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    for t in range(1, 4):
        loss_of(net, t).backward()
        gradients = {n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}
        optimizer.step(rate)
        for name, g in gradients.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            if name in ("inner.weight", "head.weight"):
                expected[name] *= 1 - rate * decay
            root = (v[name] / (1 - b2**t)).sqrt() + eps
            expected[name] -= rate * (m[name] / (1 - b1**t)) / root
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-6, rtol=1e-5)
        assert parameter.grad is None


def test_the_norm_is_of_all_gradients_and_scaling_clips_it() -> None:
    net = Net()
    optimizer = AdamW(net)
    loss_of(net, 0).backward()
    expected = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None)
    )
    assert optimizer.gradient_norm().item() == pytest.approx(expected, rel=1e-5)
    optimizer.scale_gradients(0.5 / expected)
    assert optimizer.gradient_norm().item() == pytest.approx(0.5, rel=1e-5)


def test_a_frozen_model_has_norm_zero() -> None:
    optimizer = AdamW(Net().requires_grad_(False))
    assert optimizer.gradient_norm().item() == 0.0
    assert optimizer.state_tensors() == {}


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """Three micro-batches: the float32 sum of the bfloat16 gradients, which bfloat16 itself cannot hold."""
    net, plain = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer = AdamW(net)
    sums = {n: torch.zeros(p.shape) for n, p in plain.named_parameters()}
    for seed in range(3):
        loss_of(net, seed).backward()
        assert all(p.grad is None for p in net.parameters())
        plain.zero_grad()
        loss_of(plain, seed).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float()
    for name, master in optimizer.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master.grad, sums[name])
    assert any((s != s.bfloat16().float()).any() for s in sums.values())


def test_bfloat16_weights_follow_masters_that_keep_small_updates() -> None:
    net = Net(torch.bfloat16)
    optimizer = AdamW(net)
    before = optimizer.masters["inner.weight"].detach().clone()
    for seed in range(20):
        loss_of(net, seed).backward()
        optimizer.step(1e-5)
    master = optimizer.masters["inner.weight"]
    moved = (master - before).abs()
    assert moved.max() > 5e-5  # 20 steps of about 1e-5; a bfloat16 weight of 0.3 moves in steps of 1e-3
    assert all(torch.equal(p, optimizer.masters[n].bfloat16()) for n, p in optimizer.parameters.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def steps(net: Net, optimizer: AdamW, seeds: range) -> None:
        for seed in seeds:
            loss_of(net, seed).backward()
            optimizer.step(0.01)

    net, other = Net(dtype), Net(dtype)
    optimizer = AdamW(net, weight_decay=0.1)
    steps(net, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    again = AdamW(other, weight_decay=0.1)
    again.load_state_tensors(saved)
    steps(net, optimizer, range(3, 6))
    steps(other, again, range(3, 6))
    left, right = optimizer.state_tensors(), again.state_tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = AdamW(Net())
    state = optimizer.state_tensors()
    with pytest.raises(ValueError, match=r"inner\.bias has shape \(8,\), in the state \(7,\)"):
        optimizer.load_state_tensors({**state, "master.inner.bias": torch.zeros(7)})
    state.pop("master.inner.bias")
    with pytest.raises(ValueError, match=r"master\.inner\.bias"):
        optimizer.load_state_tensors(state)
