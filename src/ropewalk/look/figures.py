"""Numbers to be read."""


def number(value: float | None) -> str:
    """12,345; 0.0312; 1.5e-07."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def short(value: float) -> str:
    """For axes: 1.5k, 20M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def percent(part: float, whole: float) -> str:
    """Never 0% of something, never 100% of what is not all."""
    if not whole:
        return "–"
    share = part / whole
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def change(a: float, b: float) -> str:
    """+12 (+3.4%)."""
    if a == b:
        return "the same"
    share = f" ({(b - a) / a:+.1%})" if a else ""
    sign = "+" if b > a else "−"
    return f"{sign}{number(abs(b - a))}{share}".replace("-", "−")
