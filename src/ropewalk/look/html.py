"""Pages from templates/, which need nothing else; every text is escaped, so that a document is just text."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ropewalk.look.charts import histogram
from ropewalk.look.figures import change, number, percent, short
from ropewalk.look.samples import visible

TEMPLATES = Path(__file__).with_name("templates")


@cache
def environment() -> Environment:
    """Values are shown with signs for control characters and the like; None is nothing."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(number=number, short=short)
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    found.globals.update(change=change, histogram=histogram, percent=percent, style=style)
    return found


def _seen(value: Any) -> Any:
    if value is None:
        return ""
    return value if isinstance(value, Markup) else visible(str(value))


def render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)
