"""optim_rules: every rule against another's implementation or its definition, whole and in small pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ropewalk.train import optim_slot
from ropewalk.train.optim import Optimizer, OptimizerConfig, matrix_names
from ropewalk.train.optim_rules import orthogonal

RATE, DECAY = 0.01, 0.1


class Weights(nn.Module):
    """A wide, a tall and a square matrix, a bias and an untied output head; gradients are made at will."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(24, 10)
        self.tall = nn.Linear(10, 24, bias=False)
        self.square = nn.Linear(16, 16, bias=False)
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.to(dtype)

    def backward(self, seed: int) -> None:
        """Adds to each parameter a random gradient, of the size that gradients have."""
        random = torch.Generator().manual_seed(seed)
        slopes = [torch.randn(p.shape, generator=random) * 10**-i for i, p in enumerate(self.parameters())]
        torch.stack(
            [(p.float() * slope).sum() for p, slope in zip(self.parameters(), slopes, strict=True)]
        ).sum().backward()


def run(config: OptimizerConfig, steps: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = Weights(dtype)
    optimizer = Optimizer(model, config)
    for seed in range(steps):
        model.backward(seed)
        optimizer.step(RATE * (seed + 1))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run_other(make: Any, steps: int = 4) -> dict[str, Tensor]:
    """The same steps by optimizers that `make(groups of parameters by whether they decay)` returns."""
    model = Weights()
    decayed = set(matrix_names(model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": DECAY},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizers = make(model, groups)
    for seed in range(steps):
        model.zero_grad()
        model.backward(seed)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (seed + 1)
            optimizer.step()
    return {name: parameter.detach() for name, parameter in named}


@pytest.fixture(params=[None, 32], ids=["whole", "pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 240 and 256 numbers are taken in pieces of 32, or rows, as large ones always are."""
    if request.param is not None:
        monkeypatch.setitem(optim_slot.CHUNK, "cpu", request.param)


def same(mine: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, weight in other.items():
        torch.testing.assert_close(mine[name], weight, atol=tolerance, rtol=1e-5, msg=f"{name} differs")


@pytest.mark.usefixtures("_pieces")
def test_adamw_is_torch_adamw() -> None:
    def make(_: nn.Module, groups: Any) -> Any:
        return [torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-6, fused=True)]

    same(run(OptimizerConfig(weight_decay=DECAY, epsilon=1e-6)), run_other(make), tolerance=0.0)


@pytest.mark.usefixtures("_pieces")
def test_lion_is_its_definition() -> None:
    """arXiv 2302.06675, algorithm 2, in float64."""
    beta1, beta2 = 0.9, 0.99
    model = Weights()
    decayed = set(matrix_names(model))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    averages = {name: torch.zeros_like(w) for name, w in weights.items()}
    for seed in range(4):
        model.zero_grad()
        model.backward(seed)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient, m = parameter.grad.double(), averages[name]
            direction = (beta1 * m + (1 - beta1) * gradient).sign()
            decay = DECAY if name in decayed else 0.0
            weights[name] -= RATE * (seed + 1) * (direction + decay * weights[name])
            averages[name] = beta2 * m + (1 - beta2) * gradient
    mine = run(OptimizerConfig("lion", weight_decay=DECAY, betas=(beta1, beta2)))
    same({name: weight.double() for name, weight in mine.items()}, weights)


@pytest.mark.usefixtures("_pieces")
def test_muon_is_torch_muon_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    inside = {"wide.weight", "tall.weight", "square.weight"}

    def make(model: nn.Module, _: Any) -> Any:
        named = dict(model.named_parameters())
        muon = torch.optim.Muon(
            [named[name] for name in inside],
            lr=RATE,
            weight_decay=DECAY,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [
            {"params": [named["head.weight"]], "weight_decay": DECAY},
            {"params": [named["wide.bias"], named["embed.weight"]], "weight_decay": 0.0},
        ]
        return [muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.95, 0.9), fused=True)]

    mine = run(OptimizerConfig("muon", weight_decay=DECAY, betas=(0.95, 0.9)))
    same(mine, run_other(make), tolerance=1e-4)  # its matrix products are in bfloat16


def test_what_muon_applies_is_nearly_orthogonal() -> None:
    """Singular values of a matrix with a condition of 1,000 end in the band that the polynomial leaves."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n)).Q for n in (32, 48))
    matrix = u @ torch.diag(torch.logspace(-3, 0, 32)) @ v[:32]
    for given in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonal(given).float())
        assert values[:20].min() > 0.6
        assert values.max() < 1.25
        assert orthogonal(given).shape == given.shape


@pytest.mark.usefixtures("_pieces")
def test_adafactor_is_transformers_adafactor() -> None:
    from transformers.optimization import Adafactor

    def make(_: nn.Module, groups: Any) -> Any:
        return [Adafactor(groups, lr=RATE, scale_parameter=False, relative_step=False, warmup_init=False)]

    same(run(OptimizerConfig("adafactor", weight_decay=DECAY)), run_other(make))


def test_adafactor_keeps_a_row_and_a_column() -> None:
    model = Weights()
    optimizer = Optimizer(model, OptimizerConfig("adafactor"))
    model.backward(0)
    optimizer.step(RATE)
    shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.state_tensors().items()}
    assert (shapes["row.wide.weight"], shapes["column.wide.weight"]) == ((10,), (24,))
    assert shapes["exp_avg_sq.wide.bias"] == (10,)
    assert "exp_avg_sq.wide.weight" not in shapes


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_weights_without_masters_go_as_far_as_those_with(name: Any) -> None:
    """30 updates far smaller than the steps of bfloat16, all one way: to nearest, nothing would move."""
    moved = []
    for masters in (True, False):
        model = Weights(torch.bfloat16)
        start = model.square.weight.detach().float()
        optimizer = Optimizer(model, OptimizerConfig(name, masters=masters))
        for _ in range(30):
            model.backward(0)
            optimizer.step(1e-5)
        moved.append(optimizer.state_tensors()["master.square.weight"].float() - start)
    exact, rounded = moved
    assert (rounded == 0).float().mean() > 0.3  # most are between two steps of bfloat16, which others took
    assert float((rounded * exact.sign()).mean()) == pytest.approx(float(exact.abs().mean()), rel=0.3)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_the_scale_of_gradients_is_applied_once(name: Any) -> None:
    """A scaled gradient gives what a smaller gradient gives; in float32 and where it is kept in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for scaled in (True, False):
            model = Weights(dtype)
            optimizer = Optimizer(model, OptimizerConfig(name, epsilon=1e-3))
            model.backward(0)
            if scaled:
                optimizer.scale_gradients(0.25)  # exact in bfloat16
            else:
                for gradient in optimizer.gradients().values():
                    gradient *= 0.25
            optimizer.step(RATE)
            results.append({n: p.detach() for n, p in model.named_parameters()})
        same(results[0], results[1])
