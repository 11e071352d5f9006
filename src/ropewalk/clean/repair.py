"""Text as it was meant: mojibake undone, one Unicode form, one kind of line end, no control characters.

repair(text)     what a recipe's `repair: true` does before all steps
Repair()         a step that says what that would change
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from ropewalk.clean.step import Step, Texts
from ropewalk.errors import UserError

_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ud800-\udfff]")
"""C0 and C1 controls but tab, form feed and line ends; byte order marks; lone surrogates."""
PASSES = 8
"""At most: what is removed or undone can leave mojibake of its own, a few layers deep at the worst."""


def repair(text: str) -> str:
    """Repairs a text. Doing it again changes nothing more.

    Mojibake is found by ftfy's heuristics, line by line (Speer 2019, ftfy). Quotation marks, ligatures,
    widths and HTML entities stay as they are: they are what somebody wrote.
    """
    for _ in range(PASSES):
        before = text
        if not text.isascii():
            text = unicodedata.normalize("NFC", _decoded_again(text))
        text = _CONTROLS.sub("", _ENDS.sub("\n", text))
        if text == before:
            break
    return text


def _decoded_again(text: str) -> str:
    """Before controls go: some of them are a part of mojibake."""
    fix = _fix_encoding()
    return "\n".join(line if line.isascii() else fix(line) for line in text.split("\n"))


class Repair(Step):
    """What `repair` would change, by kind."""

    name = "repair"
    attributes: Mapping[str, str] = {
        "mojibake": "whether it has text that was decoded wrongly and that ftfy can undo",
        "controls": "control characters, byte order marks and lone surrogates",
        "line_ends": "whether it has line ends other than line feeds",
        "composed": "whether it is in Unicode's form NFC",
    }

    def settings(self) -> Any:
        _fix_encoding()  # so that a missing package is said before anything is read
        return {"ftfy": version("ftfy"), "unicode": unicodedata.unidata_version}

    def map(self, texts: Texts) -> pa.Table:
        found = texts.texts
        return pa.table(
            {
                "mojibake": pa.array([not t.isascii() and _decoded_again(t) != t for t in found], pa.bool_()),
                "controls": pa.array([len(_CONTROLS.findall(t)) for t in found], pa.int64()),
                "line_ends": pa.array([_ENDS.search(t) is not None for t in found], pa.bool_()),
                "composed": pa.array([unicodedata.is_normalized("NFC", t) for t in found], pa.bool_()),
            }
        )


@cache
def _fix_encoding() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError as error:
        raise UserError('repairing needs an extra: pip install "ropewalk[data]"') from error
    return ftfy.fix_encoding
