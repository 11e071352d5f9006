"""The loss law of one's own data: Chinchilla's approach 3 on one's own small runs.

log(E + A / N^alpha + B / D^beta) is fitted to the logarithms of the final losses under a Huber loss of
delta 1e-3 (arXiv 2203.15556, section 3.3 and appendix D.3), from a grid of starts. What the intervals say
comes from a bootstrap of the residuals: runs are few and planned on a grid, of which a resample of whole
runs may lose a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ropewalk.errors import UserError
from ropewalk.plan.budget import LossLaw, allocate, short
from ropewalk.plan.inputs import positive, share

DELTA = 1e-3
"""Where Huber's loss turns from square to linear, in log loss: 0.1% of a loss."""
RUNS, DIFFERENT, SPREAD = 8, 3, 4.0
"""A fit asks for so many runs, and so many different N and D, the largest so many times the least."""
LOCKSTEP = 0.97
"""From this correlation of log N and log D on, what is due to which cannot be told apart."""
EXPONENTS = np.array([0.1, 0.2, 0.35, 0.5, 0.8, 1.2])
"""Starts for alpha and beta; the other three are then a linear problem."""
LOWEST, HIGHEST = 0.01, 3.0
"""Limits of the exponents: a fit that ends at one has found nothing."""
STEPS, PATIENCE = 400, 8
"""Steps at most, and without a gain after which a set of losses is left as it is."""


class Point(NamedTuple):
    """A finished run: all parameters, tokens it was trained on, final validation loss in nats per token."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """A law, as many `samples` of it as the bootstrap drew, and `warnings` where it is not to be trusted."""

    law: LossLaw
    points: tuple[Point, ...]
    samples: tuple[LossLaw, ...]
    error: float
    """root mean square of the residuals of log loss: 0.01 is 1% of the loss"""
    warnings: tuple[str, ...]

    def interval(self, quantity: Callable[[LossLaw], float], level: float = 0.9) -> tuple[float, float]:
        """Bounds between which `quantity` of the law lies with probability `level`, by the bootstrap."""
        return _interval(self.samples, quantity, level)

    def lines(self, flops: float | None = None) -> list[str]:
        """What was found, with 90% intervals; and what is best for a budget of `flops`."""
        law, sizes = self.law, [point.parameters for point in self.points]
        said = [
            f"{len(self.points)} runs of {short(min(sizes))} to {short(max(sizes))} parameters: "
            f"loss = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}, "
            f"which misses them by {self.error:.2%}"
        ]
        named = [f"{name} {self._said(name)}" for name in ("E", "alpha", "beta")]
        said.append("90% intervals: " + ", ".join(named))
        if flops is not None:
            best = allocate(flops, law)
            low, high = self.interval(lambda one: one.optimum(flops)[0])
            said.append(f"{best}; 90% interval {short(low)} to {short(high)} parameters")
        return said + [f"not to be trusted: {warning}" for warning in self.warnings]

    def _said(self, name: str) -> str:
        low, high = self.interval(lambda law: float(getattr(law, name)))
        return f"{low:.3f} to {high:.3f}"


def fit(points: Sequence[Point], trials: int = 200, seed: int = 0) -> Fit:
    """Fits the law to finished runs; `trials` refits give the intervals.

    UserError where the runs are too few or too alike for five constants: the message says what is missing.
    """
    points = tuple(Point(*point) for point in points)
    for point in points:
        positive(parameters=point.parameters, tokens=point.tokens, loss=point.loss)
    if trials < 20:
        raise UserError(f"trials is {trials}; an interval needs 20 at least")
    _check(points)
    sizes, tokens, losses = np.log(np.array(points)).T
    problem = _Problem(sizes, tokens)
    starts = problem.starts(losses)
    found, values = problem.solve(np.tile(losses, (len(starts), 1)), starts)
    best = found[values.argmin()]
    residuals = losses - problem.predict(best[None])[0]
    resampled = _resample(residuals, trials, np.random.default_rng(seed))
    refitted, _ = problem.solve(losses - residuals + resampled, np.tile(best, (trials, 1)))
    law, samples = problem.law(best), tuple(problem.law(one) for one in refitted)
    error = float(np.sqrt(np.mean(residuals**2)))
    return Fit(law, points, samples, error, tuple(_warnings(law, points, samples, error)))


class _Problem:
    """Least Huber loss for many sets of losses at once, `[sets, runs]`, over the same N and D.

    Unknowns `[sets, 5]`: log of the three terms at the mean run, alpha, beta. Around the mean, so that a
    term's size and its exponent are not the same direction.
    """

    def __init__(self, sizes: np.ndarray, tokens: np.ndarray) -> None:
        self.means = sizes.mean(), tokens.mean()
        self.sizes, self.tokens = sizes - self.means[0], tokens - self.means[1]

    def law(self, x: np.ndarray) -> LossLaw:
        a, b, e, alpha, beta = (float(value) for value in x)
        logs = a + alpha * self.means[0], b + beta * self.means[1]
        return LossLaw("fit", float(np.exp(e)), float(np.exp(logs[0])), float(np.exp(logs[1])), alpha, beta)

    def starts(self, losses: np.ndarray) -> np.ndarray:
        """For each pair of exponents the terms of least squares; a term that would be negative is tiny."""
        found = []
        for alpha in EXPONENTS:
            for beta in EXPONENTS:
                terms = np.exp(-alpha * self.sizes), np.exp(-beta * self.tokens), np.ones_like(self.sizes)
                solved = np.linalg.lstsq(np.stack(terms, 1), np.exp(losses), rcond=None)[0]
                found.append([*np.log(np.maximum(solved, 1e-3)), alpha, beta])
        return np.array(found)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._terms(x)[0]

    def _terms(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log loss `[sets, runs]` and each term's share of the loss `[sets, runs, 3]`."""
        a, b, e, alpha, beta = x.T[:, :, None]
        logs = np.stack(np.broadcast_arrays(a - alpha * self.sizes, b - beta * self.tokens, e), -1)
        top = logs.max(-1, keepdims=True)
        weights = np.exp(logs - top)
        total = weights.sum(-1, keepdims=True)
        return (top + np.log(total))[..., 0], weights / total

    def solve(self, losses: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Levenberg and Marquardt's steps on least squares weighted anew each time, which is Huber's loss.

        Gives unknowns and loss of each set; a step that does not lower a set's loss is not taken there.
        """
        x, values = x.copy(), huber(self.predict(x) - losses).sum(-1)
        damping, calm = np.full(len(x), 1e-2), np.zeros(len(x), dtype=int)
        for _ in range(STEPS):
            open_ = np.flatnonzero(calm < PATIENCE)
            if not open_.size:
                break
            tried = self._step(losses[open_], x[open_], damping[open_])
            new = huber(self.predict(tried) - losses[open_]).sum(-1)
            better, old = new < values[open_], values[open_]
            calm[open_] = np.where(new < old * (1 - 1e-6), 0, calm[open_] + 1)
            damping[open_] *= np.where(better, 1 / 3, 4.0)
            x[open_[better]], values[open_[better]] = tried[better], new[better]
        return x, values

    def _step(self, losses: np.ndarray, x: np.ndarray, damping: np.ndarray) -> np.ndarray:
        predicted, shares = self._terms(x)
        residuals = predicted - losses
        of_alpha, of_beta = -shares[..., 0] * self.sizes, -shares[..., 1] * self.tokens
        slopes = np.concatenate([shares, of_alpha[..., None], of_beta[..., None]], -1)
        weighted = slopes * (DELTA / np.maximum(np.abs(residuals), DELTA))[..., None]
        gradient = weighted.swapaxes(1, 2) @ residuals[..., None]
        curvature = weighted.swapaxes(1, 2) @ slopes
        diagonal = np.einsum("sjj->sj", curvature)
        diagonal += damping[:, None] * diagonal + 1e-12
        tried = x - np.linalg.solve(curvature, gradient)[..., 0]
        return np.concatenate([tried[:, :3].clip(-12, 12), tried[:, 3:].clip(LOWEST, HIGHEST)], 1)


def huber(residuals: np.ndarray) -> np.ndarray:
    """r^2 / 2 up to DELTA, linear beyond."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))


def _resample(residuals: np.ndarray, trials: int, rng: np.random.Generator) -> np.ndarray:
    """Residuals drawn with replacement, either sign, without the five nearest 0, and the others enlarged.

    A fit of five constants that is nearly one of absolute values goes through as many points; how often
    residuals are near 0 is what its spread depends on, and the others are too small for the same reason.
    So made, 90% intervals cover 84 to 90% for 20 runs with normal noise.
    """
    size = np.sort(np.abs(residuals))[5:] * np.sqrt(len(residuals) / (len(residuals) - 5.0))
    signs = rng.choice([-1.0, 1.0], size=(trials, len(residuals)))
    return signs * rng.choice(size, size=signs.shape)


def _interval(
    samples: Sequence[LossLaw], quantity: Callable[[LossLaw], float], level: float
) -> tuple[float, float]:
    share(level=level)
    values = [quantity(law) for law in samples]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(points: Sequence[Point]) -> None:
    """UserError where five constants cannot be found from these runs."""
    said, missing = [], []
    if len(points) < RUNS:
        missing.append(f"{RUNS} runs")
    for name, values in (
        ("model sizes", [point.parameters for point in points]),
        ("numbers of tokens", [point.tokens for point in points]),
    ):
        different = _different(values)
        spread = max(values) / min(values) if values else 1.0
        said.append(f"{different} {name} over a factor of {spread:.3g}")
        if different < DIFFERENT or spread < SPREAD:
            missing.append(f"{DIFFERENT} {name} over a factor of {SPREAD:g}")
    if not missing:
        correlation = np.corrcoef(np.log([point[:2] for point in points]).T)[0, 1]
        if abs(correlation) > LOCKSTEP:
            said.append(f"log N and log D correlated by {correlation:.3f}")
            missing.append("models of one size on different numbers of tokens")
    if missing:
        raise UserError(
            f"too little to fit: {len(points)} runs with {', '.join(said)}; "
            f"train at least {', '.join(missing)}"
        )


def _different(values: Sequence[float]) -> int:
    """How many values differ by more than 5% from the next."""
    logs = np.sort(np.log(values))
    return 1 + int((np.diff(logs) > 0.05).sum()) if len(logs) else 0


def _warnings(law: LossLaw, points: Sequence[Point], samples: Sequence[LossLaw], error: float) -> list[str]:
    """What makes a fit degenerate: a term that the runs do not show, an exponent that they leave open."""
    found = []
    least = min(point.loss for point in points)
    for term, name, exponent, values in (
        ("A / N^alpha", "alpha", law.alpha, [law.A / point.parameters**law.alpha for point in points]),
        ("B / D^beta", "beta", law.beta, [law.B / point.tokens**law.beta for point in points]),
    ):
        if max(values) - min(values) < 3 * error * least:
            found.append(f"{term} changes the loss by no more than the runs scatter")
        elif not LOWEST * 1.01 < exponent < HIGHEST * 0.99:
            found.append(f"{name} ended at its limit, {exponent:.3g}")
        else:
            low, high = _interval(samples, lambda one, name=name: float(getattr(one, name)), 0.9)  # type: ignore[misc]
            if high > 2.5 * low:
                found.append(f"{name} is open: anything from {low:.2g} to {high:.2g}; train larger or longer")
    if 0.02 * least > law.E:
        found.append("no lowest loss E shows; the runs are too far from it")
    return found
