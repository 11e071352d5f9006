"""Histograms as SVG: bars, an outline behind them, lines where limits are."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

from markupsafe import Markup

from ropewalk.look.figures import number, short
from ropewalk.look.samples import visible

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 18, 22
BASE = HEIGHT - BOTTOM

_CHART = Markup('<svg viewBox="0 0 {} {}" role="img" class="chart"><title>{}</title>{}</svg>')
_BAR = Markup(
    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="bars"><title>{}</title></rect>'
)
_OUTLINE = Markup('<path d="{}" class="outline"></path>')
_ACROSS = Markup('<line x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}" class="{}"></line>')
_UPRIGHT = Markup('<line x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}" class="{}"></line>')
_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_VALUE = Markup('<text x="{:.1f}" y="{}" text-anchor="{}" class="limit-name">{}</text>')
_LIMIT = Markup("<g><title>{}: {}</title>{}{}</g>")


class _Axis:
    """Values to places across the chart."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        self.low, self.high, self.log = low, high, log

    def __call__(self, value: float) -> float:
        if self.log:
            share = log10(max(value, self.low) / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9) + 1)
            if len(powers) > 1:
                return [10.0**p for p in powers[:: ceil(len(powers) / 5)]]
        return steps(self.low, self.high, 5)


def steps(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** floor(log10(rough))
    size *= next(f for f in (1, 2, 5, 10) if f * size >= rough)
    return [round(i * size, 12) for i in range(ceil(low / size - 1e-9), floor(high / size + 1e-9) + 1)]


def histogram(
    label: str,
    edges: Sequence[float],
    bars: Sequence[int],
    *,
    behind: Sequence[int] = (),
    limits: Sequence[Mapping[str, Any]] = (),
    log: bool = False,
    below: bool = False,
    above: bool = False,
) -> Markup:
    """Counts `bars` between edges [bars + 1]; `behind` is drawn as an outline; `limits` are {rule, value};
    `below`, `above`: the first and the last bin have more than what lies between their edges."""
    if not bars:
        return Markup('<p class="muted">Nothing to draw.</p>')
    axis = _Axis(edges[0], edges[-1], log)
    top = max(max(bars), max(behind, default=0), 1)
    drawn = [*_counts(top), *_bars(axis, edges, bars, top)]
    if behind:
        drawn.append(_outline(axis, edges, behind, top))
    drawn += [*_ticks(axis, below, above), *(_limit(axis, i, limit) for i, limit in enumerate(limits))]
    said = f"{label}: {number(sum(bars))} documents from {number(edges[0])} to {number(edges[-1])}"
    if limits:
        said += "; limits " + ", ".join(f"{limit['rule']} {number(limit['value'])}" for limit in limits)
    return _CHART.format(WIDTH, HEIGHT, visible(said), Markup().join(drawn))


def _height(count: float, top: float) -> float:
    return count / top * (BASE - TOP)


def _bars(axis: _Axis, edges: Sequence[float], bars: Sequence[int], top: int) -> Iterator[Markup]:
    for (a, b), count in zip(pairwise(edges), bars, strict=True):
        if count:
            height = max(_height(count, top), 0.8)  # what is there is seen
            width = max(axis(b) - axis(a) - 0.6, 0.6)
            said = f"{number(a)} to {number(b)}: {number(count)}"
            yield _BAR.format(axis(a), BASE - height, width, height, said)


def _outline(axis: _Axis, edges: Sequence[float], counts: Sequence[int], top: int) -> Markup:
    path = [f"M{axis(edges[0]):.1f} {BASE}"]
    for (a, b), count in zip(pairwise(edges), counts, strict=True):
        y = BASE - _height(count, top)
        path.append(f"L{axis(a):.1f} {y:.1f}L{axis(b):.1f} {y:.1f}")
    path.append(f"L{axis(edges[-1]):.1f} {BASE}")
    return _OUTLINE.format("".join(path))


def _ticks(axis: _Axis, below: bool, above: bool) -> Iterator[Markup]:
    yield _ACROSS.format(LEFT, WIDTH - RIGHT, "axis", y=BASE)
    for value in axis.ticks():
        x = axis(value)
        yield _UPRIGHT.format(BASE, BASE + 3, "axis", x=x)
        yield _TEXT.format(x, BASE + 14, "end" if x > WIDTH - 24 else "middle", short(value))
    if below:
        yield _TEXT.format(LEFT - 2, BASE - 2, "end", "‹")
    if above:
        yield _TEXT.format(WIDTH - RIGHT + 1, BASE - 2, "start", "›")


def _counts(top: int) -> Iterator[Markup]:
    for value in (v for v in steps(0, top, 2) if v and v == int(v)):
        y = BASE - _height(value, top)
        yield _ACROSS.format(LEFT, WIDTH - RIGHT, "grid", y=y)
        yield _TEXT.format(LEFT - 4, y + 3.5, "end", short(value))


def _limit(axis: _Axis, i: int, limit: Mapping[str, Any]) -> Markup:
    """Values stand above the line, at the side where there is room, and those of neighbours in two rows."""
    x = axis(limit["value"])
    right = x < WIDTH * 0.6
    value = number(limit["value"])
    line = _UPRIGHT.format(TOP - 12, BASE, "limit", x=x)
    said = _VALUE.format(x + 3 if right else x - 3, TOP - 8 + (i % 2) * 9, "start" if right else "end", value)
    return _LIMIT.format(visible(limit["rule"]), value, line, said)
