"""progress: plain lines where there is no terminal, a bar where there is, warnings always."""

import io

from rich.console import Console

from ropewalk.train.progress import Reporter

RECORD = {"step": 3, "loss": 1.25, "gradient_norm": 0.5, "tokens_per_second": 123.4, "seconds": 2.0}


def show(reporter: Reporter) -> None:
    reporter.start(10, 2)
    reporter.step(RECORD)
    reporter.step({**RECORD, "step": 4}, line=False)
    reporter.warn("careful [with] markup")
    reporter.stop()


def test_plain_lines() -> None:
    out = io.StringIO()
    show(Reporter(console=Console(file=out, soft_wrap=True)))
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 3/10  loss 1.2500  grad 0.5  123 tok/s  ")
    assert first.endswith(" left")
    assert second == "warning: careful [with] markup"


def test_the_time_left_counts_steps_only() -> None:
    """A long validation before the first step must not be multiplied by the number of steps."""
    out = io.StringIO()
    reporter = Reporter(console=Console(file=out, soft_wrap=True))
    reporter.start(10, 0)
    reporter.step({**RECORD, "step": 1, "seconds": 20.0})
    assert "3:00 left" in out.getvalue()


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    show(Reporter(console=Console(file=out, force_terminal=True, width=100)))
    assert "4/10" in out.getvalue()
    assert "loss 1.2500" in out.getvalue()


def test_only_warnings_when_not_shown() -> None:
    out = io.StringIO()
    show(Reporter(shown=False, console=Console(file=out, soft_wrap=True)))
    assert out.getvalue() == "warning: careful [with] markup\n"
