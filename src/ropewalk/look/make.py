"""`ropewalk prepare --profile`: prepared data on one page, profile.html, and the same as profile.json."""

import json
from pathlib import Path
from typing import Any

from ropewalk.clean.quality import Quality
from ropewalk.data.attributes import Attributes, Unit
from ropewalk.data.parts import Makers, Progress
from ropewalk.data.view import View
from ropewalk.files import atomic_write
from ropewalk.look.alerts import alerts
from ropewalk.look.gather import gather
from ropewalk.look.page import page
from ropewalk.look.unit import ProfileUnit


def profile(
    folder: Path,
    *,
    packing: str = "best_fit",
    workers: int = 0,
    on: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes both files into the folder of prepared data, and gives what profile.json holds.

    What is counted of a unit is kept in parts/. Memory is some tens of bytes a document, and what the
    sketches take (see sketch.py). Raises UserError where the files in parts/ are gone.
    """
    view = View.open(folder)
    with Makers(workers, on, progress) as makers:
        _measured(view, makers)
        tasks = [ProfileUnit.of(part.documents, part.attributes, part.verdicts) for part in view.parts]
        makers.make("profile", tasks)
    account = gather(view, tasks, packing)
    account["alerts"] = alerts(account)
    atomic_write(folder / "profile.json", json.dumps(account, indent=1, ensure_ascii=False))
    atomic_write(folder / "profile.html", page(account))
    return account


def _measured(view: View, makers: Makers) -> None:
    """Lengths and ratios are there to be looked at even where no rule asked for them."""
    step = Quality()
    if any(name in view.attributes for name in step.attributes):
        return
    units = [Unit(part.documents, part.documents.stat().st_size, {}, part.held_out) for part in view.parts]
    attributes = Attributes(view.store, units, makers)
    attributes.add(step, lambda files: _no_parts())
    view.extend(step.attributes, attributes.files([*step.attributes]))


def _no_parts() -> Any:
    raise AssertionError("a step that looks at one text at a time asks for no others")
