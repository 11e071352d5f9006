"""Histograms as SVG: bars, an outline behind them, lines where limits are."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, floor, log10

from ropewalk.look.html import Markup, el, number, short

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 18, 22


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
            step = max(1, ceil(len(powers) / 5))
            return [10.0**p for p in powers[::step]]
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
    limits: Sequence[tuple[str, float]] = (),
    log: bool = False,
    below: bool = False,
    above: bool = False,
) -> Markup:
    """Counts `bars` between edges [bars + 1]; `behind` is drawn as an outline; `limits` are (name, value);
    `below`, `above`: the first and the last bin have more than what lies between their edges."""
    if not bars:
        return el("p", "Nothing to draw.", class_="muted")
    axis = _Axis(edges[0], edges[-1], log)
    top = max(max(bars), max(behind, default=0), 1)
    inside = [
        _counts(axis, top),
        *(_bars(axis, edges, bars, top)),
        _outline(axis, edges, behind, top) if behind else None,
        _ticks(axis, below, above),
        *(_limit(axis, name, value, i) for i, (name, value) in enumerate(limits)),
    ]
    said = f"{label}: {number(sum(bars))} documents from {number(edges[0])} to {number(edges[-1])}"
    if limits:
        said += "; limits " + ", ".join(f"{name} {number(value)}" for name, value in limits)
    return el("svg", el("title", said), *inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")


def _height(count: float, top: float) -> float:
    return count / top * (HEIGHT - TOP - BOTTOM)


def _bars(axis: _Axis, edges: Sequence[float], bars: Sequence[int], top: int) -> list[Markup]:
    result = []
    for (a, b), count in zip(pairwise(edges), bars, strict=True):
        if not count:
            continue
        height = max(_height(count, top), 0.8)  # what is there is seen
        x, width = axis(a), max(axis(b) - axis(a) - 0.6, 0.6)
        said = f"{number(a)} to {number(b)}: {number(count)}"
        result.append(
            el(
                "rect",
                el("title", said),
                x=f"{x:.1f}",
                y=f"{HEIGHT - BOTTOM - height:.1f}",
                width=f"{width:.1f}",
                height=f"{height:.1f}",
                class_="bars",
            )
        )
    return result


def _outline(axis: _Axis, edges: Sequence[float], counts: Sequence[int], top: int) -> Markup:
    base = HEIGHT - BOTTOM
    path = [f"M{axis(edges[0]):.1f} {base}"]
    for (a, b), count in zip(pairwise(edges), counts, strict=True):
        y = base - _height(count, top)
        path.append(f"L{axis(a):.1f} {y:.1f}L{axis(b):.1f} {y:.1f}")
    path.append(f"L{axis(edges[-1]):.1f} {base}")
    return el("path", d="".join(path), class_="outline")


def _ticks(axis: _Axis, below: bool, above: bool) -> list[Markup]:
    base = HEIGHT - BOTTOM
    found = [el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis")]
    ticks = axis.ticks()
    for value in ticks:
        x = axis(value)
        found.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=base, y2=base + 3, class_="axis"))
        anchor = "end" if x > WIDTH - 24 else "middle"
        found.append(el("text", short(value), x=f"{x:.1f}", y=base + 14, text_anchor=anchor))
    for there, x, sign in ((below, LEFT - 2, "‹"), (above, WIDTH - RIGHT + 1, "›")):
        if there:
            found.append(el("text", sign, x=x, y=base - 2, text_anchor="end" if sign == "‹" else "start"))
    return found


def _counts(axis: _Axis, top: int) -> list[Markup]:
    result = []
    for value in (v for v in steps(0, top, 2) if v and v == int(v)):
        y = HEIGHT - BOTTOM - _height(value, top)
        result.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        result.append(el("text", short(value), x=LEFT - 4, y=f"{y + 3.5:.1f}", text_anchor="end"))
    return result


def _limit(axis: _Axis, name: str, value: float, i: int) -> Markup:
    """Names stand above the line, at the side where there is room, and those of neighbours in two rows."""
    x = axis(value)
    right = x < WIDTH * 0.6
    said = el(
        "text",
        number(value),
        x=f"{x + (3 if right else -3):.1f}",
        y=TOP - 8 + (i % 2) * 9,
        text_anchor="start" if right else "end",
        class_="limit-name",
    )
    line = el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP - 12, y2=HEIGHT - BOTTOM, class_="limit")
    return el("g", el("title", f"{name}: {number(value)}"), line, said)
