"""How large a model, and on how many tokens, for what one can spend; and what the data at hand allow.

N counts all parameters, D tokens, C FLOPs; C = 6 N D everywhere but in DeepSeek's rule. Losses are in nats
per token of the data and the tokenizer that a law was fitted on: trust differences and optima, not values.

J. Hoffmann et al., Training compute-optimal large language models, arXiv 2203.15556 (Chinchilla).
T. Besiroglu et al., Chinchilla scaling: a replication attempt, arXiv 2404.10102.
DeepSeek-AI, DeepSeek LLM: scaling open-source language models with longtermism, arXiv 2401.02954.
N. Muennighoff et al., Scaling data-constrained language models, arXiv 2305.16264.
"""

import math
from dataclasses import dataclass

import numpy as np

from ropewalk.plan.inputs import one_of, positive, share

DAY, HOUR = 86_400.0, 3_600.0


@dataclass(frozen=True)
class LossLaw:
    """Loss = E + A / N^alpha + B / D^beta: approach 3 of Chinchilla."""

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss where 6 N D = flops: N = G (C/6)^a, D = (C/6)^b / G (their equation 4)."""
        a, size = self.beta / (self.alpha + self.beta), flops / 6.0
        return self._scale * size**a, size ** (1.0 - a) / self._scale

    def tokens_for(self, parameters: float) -> float:
        """D for which a model of so many parameters is the optimum of its budget."""
        return float((self.beta * self.B / (self.alpha * self.A) * parameters**self.alpha) ** (1 / self.beta))

    def parameters_for(self, tokens: float) -> float:
        """N for which so many tokens are the optimum of their budget."""
        return float((self.alpha * self.A / (self.beta * self.B) * tokens**self.beta) ** (1 / self.alpha))

    def flops_for(self, loss: float) -> float:
        """The smallest budget that reaches `loss`; infinite where E is not below it."""
        # on the optimal path both terms fall as C^-gamma, so that what is above E is one power law
        above = loss - self.E
        gamma = self.alpha * self.beta / (self.alpha + self.beta)
        at_six = self.loss(*self.optimum(6.0)) - self.E
        return 6.0 * (at_six / above) ** (1.0 / gamma) if above > 0 else math.inf

    @property
    def _scale(self) -> float:
        ratio = self.alpha * self.A / (self.beta * self.B)
        return float(ratio ** (1.0 / (self.alpha + self.beta)))


CHINCHILLA = LossLaw("chinchilla-3", 1.69, 406.4, 410.7, 0.34, 0.28)
"""As printed. Two digits of the exponents are too few: with others that round to the same (0.33815, 0.284975)
the tokens of their Table A3 come out to 7%, with these they are 1.6 to 2.2 times as many. No constants in the
neighbourhood do better: two rows of that table do not even agree with their own 6 N D."""
REPLICATION = LossLaw("replication", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Fitted again on the points of their figure 4; agrees with approaches 1 and 2. The one to use."""
DATA_CONSTRAINED = LossLaw(
    "data-constrained", math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596
)
"""Muennighoff's, for C4: the law that the constants of repetition were fitted with."""
REPEATED_TOKENS, EXCESS_PARAMETERS = 15.387756, 5.309743
"""R_D* and R_N*: so many repetitions in, a further one is worth 1/e of the first."""
LAWS = {law.name: law for law in (REPLICATION, CHINCHILLA, DATA_CONSTRAINED)}

RULES = {"chinchilla-1": (0.0992, 0.4981), "chinchilla-2": (0.1449, 0.4899)}
"""k and a of N = k C^a for approaches 1 (training curves) and 2 (IsoFLOP profiles). The paper prints only
a = 0.50 and 0.49; these are the lines through its Tables 3 and A3, which they meet to 1% but for the row of
67e9 parameters (1.2 and 3.3%: it fits 68 and 69)."""


@dataclass(frozen=True)
class Allocation:
    """A budget of `flops` divided by one rule; `loss` is None where the rule promises none."""

    rule: str
    flops: float
    parameters: float
    tokens: float
    loss: float | None = None

    def __str__(self) -> str:
        expected = f", loss {self.loss:.3f}" if self.loss is not None else ""
        per = f"{self.tokens / self.parameters:.1f} a parameter"
        return (
            f"{self.rule}: {short(self.parameters)} parameters, {short(self.tokens)} tokens ({per}){expected}"
        )


def allocate(flops: float, rule: str | LossLaw = REPLICATION) -> Allocation:
    """The compute-optimal model of a budget. UserError for an unknown rule: a name in LAWS or RULES."""
    positive(flops=flops)
    known: dict[str, LossLaw | tuple[float, float]] = {**LAWS, **RULES}
    law = rule if isinstance(rule, LossLaw) else one_of("scaling rule", rule, known)
    if isinstance(law, LossLaw):
        parameters, tokens = law.optimum(flops)
        return Allocation(law.name, flops, parameters, tokens, law.loss(parameters, tokens))
    parameters = law[0] * flops ** law[1]
    return Allocation(str(rule), flops, parameters, flops / (6.0 * parameters))


@dataclass(frozen=True)
class DeepSeek:
    """DeepSeek LLM's rules. `flops_per_token` M counts what is multiplied, attention too, no embedding.

    M = 72 layers hidden^2 + 12 layers hidden sequence, and C = M D.
    """

    flops: float
    flops_per_token: float
    tokens: float
    learning_rate: float
    batch_tokens: float

    def __str__(self) -> str:
        return (
            f"deepseek: {self.flops_per_token:.3g} FLOPs a token (about {short(self.flops_per_token / 6)} "
            f"parameters beside the embedding), {short(self.tokens)} tokens, learning rate "
            f"{self.learning_rate:.2g}, {short(self.batch_tokens)} tokens a batch"
        )


def deepseek(flops: float) -> DeepSeek:
    """Equations 1 and 4 of DeepSeek LLM, for its data and multi-step schedule; C from 1e17 to 1e24 or so."""
    positive(flops=flops)
    return DeepSeek(
        flops,
        flops_per_token=0.1715 * flops**0.5243,
        tokens=5.8316 * flops**0.4757,
        learning_rate=0.3118 * flops**-0.1250,
        batch_tokens=0.2920 * flops**0.3271,
    )


@dataclass(frozen=True)
class Cost:
    """What a budget takes on given devices; `money` in the currency of the price, None without one."""

    flops: float
    devices: int
    days: float
    money: float | None

    def __str__(self) -> str:
        money = f" for {self.money:,.0f}" if self.money is not None else ""
        hours = self.days * 24 * self.devices
        time = f"{self.days:.3g} days on {self.devices:,} devices ({hours:,.0f} device-hours)"
        return f"{self.flops:.3g} FLOPs: {time}{money}"


def cost(
    flops: float,
    devices: int,
    peak: float,
    mfu: float = 0.4,
    price: float | None = None,
    goodput: float = 1.0,
) -> Cost:
    """Days and money of `flops` on devices of `peak` FLOP/s of which training uses the share `mfu`.

    `price` is of one device for one hour; `goodput` the share of the time that goes into steps which count.
    """
    positive(flops=flops, devices=devices, peak=peak)
    share(mfu=mfu, goodput=goodput)
    if price is not None:
        positive(price=price)
    seconds = flops / (devices * peak * mfu * goodput)
    return Cost(flops, devices, seconds / DAY, None if price is None else price * devices * seconds / HOUR)


def flops_in(devices: int, days: float, peak: float, mfu: float = 0.4, goodput: float = 1.0) -> float:
    """FLOPs that so many devices of `peak` FLOP/s do in so many days."""
    positive(devices=devices, days=days, peak=peak)
    share(mfu=mfu, goodput=goodput)
    return devices * days * DAY * peak * mfu * goodput


def flops_for_money(money: float, price: float, peak: float, mfu: float = 0.4, goodput: float = 1.0) -> float:
    """FLOPs that `money` buys at `price` for one hour of one device of `peak` FLOP/s."""
    positive(money=money, price=price, peak=peak)
    share(mfu=mfu, goodput=goodput)
    return money / price * HOUR * peak * mfu * goodput


@dataclass(frozen=True)
class OffOptimum:
    """A model of fixed size on `tokens`, against the optimum of equal loss: `best`."""

    parameters: float
    tokens: float
    loss: float
    best: Allocation

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens

    @property
    def training_ratio(self) -> float:
        """FLOPs of training over the least that reach this loss; 1 or more."""
        return self.flops / self.best.flops

    @property
    def serving_ratio(self) -> float:
        """FLOPs of a served token over those of the optimum's."""
        return self.parameters / self.best.parameters

    def lines(self) -> list[str]:
        name = f"{short(self.parameters)} parameters on {short(self.tokens)} tokens"
        best = f"{short(self.best.parameters)} on {short(self.best.tokens)}"
        return [
            f"{name}: loss {self.loss:.3f} expected ({self.best.rule})",
            f"training: {self.training_ratio:.2f} times the FLOPs of the optimum of the same loss, {best}",
            f"serving: {self.serving_ratio:.2f} times the FLOPs a token of that optimum",
        ]


def off_optimum(parameters: float, tokens: float, law: LossLaw = REPLICATION) -> OffOptimum:
    """What it costs to train another size than the optimum: longer (over-training) or shorter."""
    positive(parameters=parameters, tokens=tokens)
    loss = law.loss(parameters, tokens)
    return OffOptimum(parameters, tokens, loss, allocate(law.flops_for(loss), law))


@dataclass(frozen=True)
class DataUse:
    """`tokens` of training on `unique` ones; `effective` is what fresh ones would do as much."""

    tokens: float
    unique: float
    effective: float

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique

    @property
    def value_of_next(self) -> float:
        """What the next token is worth, of a fresh one: the slope of `effective`."""
        return math.exp(-max(0.0, self.epochs - 1.0) / REPEATED_TOKENS)

    @property
    def limit(self) -> float:
        """Fresh tokens that these are worth after ever so many epochs."""
        return self.unique * (1.0 + REPEATED_TOKENS)

    def lines(self) -> list[str]:
        if self.epochs <= 1.0:
            return [f"{short(self.tokens)} tokens of {short(self.unique)}: none is seen twice"]
        said = (
            f"{short(self.tokens)} tokens are {self.epochs:.1f} epochs of {short(self.unique)}; they do as "
            f"much as {short(self.effective)} fresh ones"
        )
        if self.epochs <= 4.0:
            verdict = "up to 4 epochs, repeated tokens are nearly as good as fresh ones"
        elif self.value_of_next > 0.1:
            verdict = f"a further epoch is worth {self.value_of_next:.0%} of a fresh one"
        else:
            verdict = (
                f"more epochs no longer help: the next is worth {self.value_of_next:.0%} of a fresh one, and "
                f"no number of them more than {short(self.limit)} tokens; find more data or stop earlier"
            )
        return [said, verdict]


def data_use(tokens: float, unique: float) -> DataUse:
    """Effective data D' = U + U R* (1 - exp(-R / R*)) with R = D / U - 1 repetitions (Muennighoff, eq. 5).

    Fitted up to about 60 epochs at 1e19 to 1e21 FLOPs; with little regularization large models overfit
    sooner than it says.
    """
    positive(tokens=tokens, unique=unique)
    return DataUse(tokens, unique, float(_worth(tokens, min(unique, tokens), REPEATED_TOKENS)))


def loss_on_repeated(parameters: float, tokens: float, unique: float) -> float:
    """Expected loss (Muennighoff, C4) of training on `tokens`, of which `unique` differ."""
    positive(parameters=parameters, tokens=tokens, unique=unique)
    return float(_loss_on_repeated(np.asarray(parameters), np.asarray(tokens), unique))


@dataclass(frozen=True)
class RepeatedPlan:
    """The best use of a budget where only `data.unique` tokens exist; `fresh` is with data enough."""

    parameters: float
    data: DataUse
    loss: float
    fresh: Allocation

    def lines(self) -> list[str]:
        ideal = f"{short(self.fresh.parameters)} parameters on {short(self.fresh.tokens)} tokens"
        best = f"{short(self.parameters)} parameters, {self.data.epochs:.1f} epochs"
        return [
            f"with these data: {best}, loss {self.loss:.3f}",
            f"with data enough: {ideal}, loss {self.fresh.loss:.3f}",
            *self.data.lines(),
        ]


def best_on_repeated(flops: float, unique: float) -> RepeatedPlan:
    """The (N, D) with 6 N D = flops of least loss for `unique` tokens; no closed form is known.

    N is searched for on a grid of 0.1%, from a hundredth of the unconstrained optimum to a hundred times it.
    """
    positive(flops=flops, unique=unique)
    fresh = allocate(flops, DATA_CONSTRAINED)
    parameters = fresh.parameters * np.geomspace(0.01, 100.0, 9_211)
    tokens = flops / (6.0 * parameters)
    losses = _loss_on_repeated(parameters, tokens, unique)
    best = int(losses.argmin())
    return RepeatedPlan(
        float(parameters[best]), data_use(float(tokens[best]), unique), float(losses[best]), fresh
    )


def _loss_on_repeated(parameters: np.ndarray, tokens: np.ndarray, unique: float) -> np.ndarray:
    law = DATA_CONSTRAINED
    unique_tokens = np.minimum(unique, tokens)
    needed = np.minimum(parameters, [law.parameters_for(float(u)) for u in np.ravel(unique_tokens)])
    size = _worth(parameters, needed.reshape(parameters.shape), EXCESS_PARAMETERS)
    data = _worth(tokens, unique_tokens, REPEATED_TOKENS)
    return law.E + law.A / size**law.alpha + law.B / data**law.beta


def _worth(total: np.ndarray | float, unique: np.ndarray | float, constant: float) -> np.ndarray:
    repeated = np.asarray(total / unique - 1.0)
    return np.asarray(unique * (1.0 + constant * -np.expm1(-repeated / constant)))


def short(number: float) -> str:
    """1.4e12 -> `1.4T`: three digits with K, M, B or T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}" if number < 1e15 else f"{number / size:,.0f}{letter}"
    return f"{number:.3g}"
