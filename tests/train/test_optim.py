"""optim: what the Optimizer keeps, where and when: masters, gradients, states that come back bit for bit."""

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropewalk.errors import UserError
from ropewalk.train import optim_slot
from ropewalk.train.optim import Optimizer, OptimizerConfig, matrix_names, refusals

RULES = ("adamw", "lion", "muon", "adafactor")
ADAMW = OptimizerConfig()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.checkpointing = checkpointing
        self.to(dtype)

    def block(self, hidden: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(hidden)))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for _ in range(2):  # weights that are used twice have one gradient all the same
            hidden = (
                checkpoint(self.block, hidden, use_reentrant=False)
                if self.checkpointing
                else self.block(hidden)
            )
        return self.head(hidden)


def loss_of(net: Net, seed: int) -> Tensor:
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def steps(
    net: Net, optimizer: Optimizer, seeds: range, micro_batches: int = 1
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of steps of one batch, or more, per seed."""
    losses, norms = [], []
    for seed in seeds:
        optimizer.begin(0.01)
        for part in range(micro_batches):
            loss = loss_of(net, seed + 100 * part)
            loss.backward()
        losses.append(loss.item())
        norms.append(optimizer.gradient_norm().item())
        optimizer.step(0.01)
    return losses, norms


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 24 numbers, so that these small matrices go through all that large ones do."""
    monkeypatch.setitem(optim_slot.CHUNK, "cpu", 24)


@pytest.fixture
def _offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`offload` sends what is on the CPU through the code for other devices, some gradients late."""
    monkeypatch.setattr(Optimizer, "_OFFLOADED", ("cpu", "cuda"))
    monkeypatch.setattr(optim_slot.Host, "IN_FLIGHT", 3)


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
    optimizer = Optimizer(net, OptimizerConfig(weight_decay=decay, betas=(b1, b2), epsilon=eps))
    expected = {n: p.detach().double() for n, p in net.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    for t in range(1, 4):
        loss_of(net, t).backward()
        gradients = {n: g.double() for n, g in optimizer.gradients().items()}
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
    loss_of(net, 0).backward()
    expected = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None)
    )
    net.zero_grad()
    optimizer = Optimizer(net, ADAMW)
    loss_of(net, 0).backward()
    assert optimizer.gradient_norm().item() == pytest.approx(expected, rel=1e-5)
    optimizer.scale_gradients(0.5 / expected)
    assert optimizer.gradient_norm().item() == pytest.approx(0.5, rel=1e-5)
    optimizer.step(0.0)
    loss_of(net, 0).backward()
    assert optimizer.gradient_norm().item() == pytest.approx(expected, rel=1e-5)


def test_a_frozen_model_has_norm_zero() -> None:
    optimizer = Optimizer(Net().requires_grad_(False), ADAMW)
    assert optimizer.gradient_norm().item() == 0.0
    assert optimizer.state_tensors() == {}


@pytest.mark.parametrize("masters", [True, False])
def test_bfloat16_gradients_add_up_in_float32(masters: bool) -> None:
    """Three micro-batches: the float32 sum of the bfloat16 gradients, which bfloat16 itself cannot hold."""
    net, plain = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer = Optimizer(net, OptimizerConfig(masters=masters))
    sums = {n: torch.zeros(p.shape) for n, p in plain.named_parameters() if p.requires_grad}
    for seed in range(3):
        loss_of(net, seed).backward()
        assert all(p.grad is None for p in net.parameters())
        plain.zero_grad()
        loss_of(plain, seed).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float()
        kept = torch.bfloat16 if seed == 0 else torch.float32
        assert all(
            g.dtype == kept and torch.equal(g.float(), sums[n]) for n, g in optimizer.gradients().items()
        )
    assert any((s != s.bfloat16().float()).any() for s in sums.values())


def test_bfloat16_weights_follow_masters_that_keep_small_updates() -> None:
    net = Net(torch.bfloat16)
    optimizer = Optimizer(net, ADAMW)
    before = optimizer.state_tensors()["master.inner.weight"].clone()
    for seed in range(20):
        loss_of(net, seed).backward()
        optimizer.step(1e-5)
    state = optimizer.state_tensors()
    moved = (state["master.inner.weight"] - before).abs()
    assert moved.max() > 5e-5  # 20 steps of about 1e-5; a bfloat16 weight of 0.3 moves in steps of 1e-3
    assert all(torch.equal(p, state[f"master.{n}"].bfloat16()) for n, p in optimizer.parameters.items())


def test_norms_of_many_numbers_are_exact() -> None:
    """Two million: a plain float32 sum of so many squares is off by a tenth of a percent and more."""
    net = nn.Linear(2000, 1000, bias=False).bfloat16()
    optimizer = Optimizer(net, ADAMW)
    slope = (1 + torch.rand(1000, 2000, generator=torch.Generator().manual_seed(0))).bfloat16()
    (net.weight * slope).sum().backward()
    assert optimizer.gradient_norm().item() == pytest.approx(slope.double().norm().item(), rel=1e-5)


def test_rates_have_factors_by_name() -> None:
    """A factor of 3 is a learning rate of 3 times as much, and unknown names are refused."""
    nets, starts = (Net(), Net()), Net().state_dict()
    plain = Optimizer(nets[0], OptimizerConfig("lion"))
    other = Optimizer(nets[1], OptimizerConfig("lion"), rate_factors={"inner.weight": 3.0})
    for net, optimizer in zip(nets, (plain, other), strict=True):
        steps(net, optimizer, range(1))
    for name in plain.parameters:
        moved, expected = (net.get_parameter(name) - starts[name] for net in nets[::-1])
        torch.testing.assert_close(moved, expected * (3.0 if name == "inner.weight" else 1.0))
    with pytest.raises(ValueError, match=r"no trained parameter is named frozen\.weight"):
        Optimizer(Net(), ADAMW, rate_factors={"frozen.weight": 2.0})


def test_what_gets_no_gradient_stays_as_it_is() -> None:
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.inner.weight.square().sum().backward()
    optimizer.step(0.1)
    changed = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["inner.weight"]
    assert {key for key in optimizer.state_tensors() if key.startswith("step.")} == {"step.inner.weight"}


def test_discarded_gradients_leave_no_trace() -> None:
    net, other = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer, plain = Optimizer(net, ADAMW), Optimizer(other, ADAMW)
    loss_of(net, 5).backward()
    optimizer.scale_gradients(0.1)
    optimizer.discard()
    assert optimizer.gradient_norm().item() == 0.0
    assert steps(net, optimizer, range(2)) == steps(other, plain, range(2))


def test_a_freed_optimizer_lets_the_model_go() -> None:
    net = Net()
    optimizer = weakref.ref(Optimizer(net, ADAMW))
    gc.collect()
    assert optimizer() is None
    loss_of(net, 0).backward()
    assert net.inner.weight.grad is not None


MODES: dict[str, dict[str, Any]] = {
    "masters": {},
    "stochastic": {"masters": False},
    "in-backward": {"in_backward": True},
    "in-backward-stochastic": {"in_backward": True, "masters": False},
}


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_bit_for_bit(name: Any, mode: str, dtype: torch.dtype) -> None:
    config = OptimizerConfig(name, weight_decay=0.1, **MODES[mode])
    net, other = Net(dtype), Net(dtype)
    optimizer = Optimizer(net, config, seed=7)
    steps(net, optimizer, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    again = Optimizer(other, config, seed=7)
    again.load_state_tensors({**saved, "random.cpu": torch.zeros(3)})
    assert steps(net, optimizer, range(3, 6)) == steps(other, again, range(3, 6))
    left, right = optimizer.state_tensors(), again.state_tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_state_in_few_bits_goes_on_bit_for_bit(bits: Any) -> None:
    def start() -> tuple[nn.Linear, Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64).bfloat16()
        return model, Optimizer(model, OptimizerConfig(state_bits=bits, masters=False), seed=1)

    def run(model: nn.Linear, optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            slope = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
            (model.weight.float() * slope).sum().backward()
            optimizer.step(0.01)

    model, optimizer = start()
    run(model, optimizer, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    assert saved["exp_avg_codes.weight"].dtype == torch.uint8
    other, again = start()
    again.load_state_tensors(saved)
    run(model, optimizer, range(3, 6))
    run(other, again, range(3, 6))
    assert torch.equal(model.weight, other.weight)
    assert all(torch.equal(t, again.state_tensors()[key]) for key, t in optimizer.state_tensors().items())


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer(Net(), ADAMW)
    state = optimizer.state_tensors()
    with pytest.raises(
        ValueError, match=r"inner\.bias has shape \(8,\) float32, in the state shape \(7,\) float32"
    ):
        optimizer.load_state_tensors({**state, "master.inner.bias": torch.zeros(7)})
    state.pop("master.inner.bias")
    with pytest.raises(ValueError, match=r"of another model: master\.inner\.bias"):
        optimizer.load_state_tensors(state)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (OptimizerConfig("lion"), r"other settings of the optimizer: exp_avg_sq\."),
        (OptimizerConfig("adafactor"), r"other settings of the optimizer: (column|exp_avg)"),
        (OptimizerConfig(masters=False), r"embed\.weight has shape \(11, 8\) bfloat16, .* float32"),
    ],
)
def test_a_state_of_other_settings_is_refused(other: OptimizerConfig, problem: str) -> None:
    net = Net(torch.bfloat16)
    optimizer = Optimizer(net, ADAMW)
    steps(net, optimizer, range(1))
    with pytest.raises(ValueError, match=problem):
        Optimizer(Net(torch.bfloat16), other).load_state_tensors(optimizer.state_tensors())


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "tied", "checkpointed"])
def test_updates_in_backward_are_those_of_a_step(
    name: Any, masters: bool, dtype: torch.dtype, kind: str
) -> None:
    """The same losses, norms and weights over four steps, bit for bit; and no gradient is left."""
    config = OptimizerConfig(name, weight_decay=0.1, masters=masters)
    nets = []
    for _ in range(2):
        net = Net(dtype, checkpointing=kind == "checkpointed")
        if kind == "tied":
            net.head.weight = net.embed.weight
        nets.append(net)
    ordinary, early = (
        Optimizer(nets[0], config, seed=2),
        Optimizer(nets[1], replace(config, in_backward=True), seed=2),
    )
    assert steps(nets[0], ordinary, range(4)) == steps(nets[1], early, range(4))
    left, right = ordinary.state_tensors(), early.state_tensors()
    assert all(torch.equal(left[key], right[key]) for key in left)

    before = {key: tensor.clone() for key, tensor in right.items()}
    early.begin(0.01)
    loss_of(nets[1], 9).backward()
    assert early.gradients() == {}
    changed = {key for key, tensor in early.state_tensors().items() if not torch.equal(tensor, before[key])}
    assert {f"step.{n}" for n in early.parameters} <= changed


def test_a_second_gradient_after_an_update_in_backward_is_an_error() -> None:
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(in_backward=True))
    optimizer.begin(0.01)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="second gradient in one step"):
        loss_of(net, 1).backward()


def test_without_begin_nothing_is_updated_in_backward() -> None:
    """So that a backward pass outside of a step (a check, a probe) does no harm."""
    net, other = Net(), Net()
    optimizer, plain = Optimizer(net, OptimizerConfig(in_backward=True)), Optimizer(other, ADAMW)
    loss_of(net, 5).backward()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    optimizer.discard()
    assert steps(net, optimizer, range(2)) == steps(other, plain, range(2))


@pytest.mark.usefixtures("_small_pieces", "_offloaded")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_offloading_changes_no_bit(name: Any, masters: bool, dtype: torch.dtype, micro_batches: int) -> None:
    config = OptimizerConfig(name, weight_decay=0.1, masters=masters)
    near, far = Net(dtype), Net(dtype)
    here, host = Optimizer(near, config, seed=2), Optimizer(far, replace(config, offload=True), seed=2)
    assert steps(near, here, range(4), micro_batches) == steps(far, host, range(4), micro_batches)
    assert all(torch.equal(p, q) for p, q in zip(near.parameters(), far.parameters(), strict=True))
    masters_there = host.state_tensors()
    for parameter_name, parameter in far.named_parameters():
        if parameter.requires_grad:
            assert masters_there[f"master.{parameter_name}"].data_ptr() != parameter.data_ptr()

    again = Optimizer(Net(dtype), config)  # a state made with offloading goes on without
    again.load_state_tensors(masters_there)
    assert all(torch.equal(p, again.parameters[n]) for n, p in host.parameters.items())


@pytest.mark.usefixtures("_offloaded")
def test_offloaded_gradients_can_be_clipped() -> None:
    near, far = Net(), Net()
    for net, config in ((near, ADAMW), (far, OptimizerConfig(offload=True))):
        optimizer = Optimizer(net, config)
        for seed in range(3):
            loss_of(net, seed).backward()
            optimizer.scale_gradients(0.01 / optimizer.gradient_norm().item())
            assert optimizer.gradient_norm().item() == pytest.approx(0.01)
            optimizer.step(0.01)
    assert all(torch.equal(p, q) for p, q in zip(near.parameters(), far.parameters(), strict=True))


def test_on_a_cpu_offload_changes_nothing() -> None:
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(offload=True))
    assert optimizer.state_bytes() == 0
    assert optimizer.state_tensors()["master.inner.weight"].data_ptr() == net.inner.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_offloading_from_a_gpu(masters: bool, micro_batches: int) -> None:
    """Weights of a million numbers, streamed to the host and back, end as on the GPU but for rounding."""
    ends = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).to("cuda", torch.bfloat16)
        optimizer = Optimizer(model, OptimizerConfig(offload=offload, masters=masters))
        for step in range(5):
            for part in range(micro_batches):
                torch.manual_seed(10 * step + part)
                model(torch.randn(64, 1024).to("cuda", torch.bfloat16)).float().square().mean().backward()
            optimizer.step(1e-3)
        ends.append([p.float().cpu() for p in model.parameters()])
        state = optimizer.state_tensors().values()
        assert {t.device.type for t in state if t.ndim} == {"cpu" if offload else "cuda"}
    for here, far in zip(*ends, strict=True):
        torch.testing.assert_close(here, far, atol=2e-3 if masters else 4e-3, rtol=0.02)


def test_pairs_that_cannot_work_are_refused_with_the_reason() -> None:
    assert refusals(OptimizerConfig(in_backward=True)) == []
    assert refusals(OptimizerConfig("lion", state_bits=8, masters=False, offload=True)) == []
    for config, words in (
        (OptimizerConfig(in_backward=True, offload=True), "choose one"),
        (OptimizerConfig("muon", state_bits=8), "muon's state stays"),
        (OptimizerConfig("adafactor", state_bits=4), "adafactor's state stays"),
    ):
        (reason,) = refusals(config)
        assert words in reason
        with pytest.raises(UserError, match=words):
            Optimizer(Net(), config)
