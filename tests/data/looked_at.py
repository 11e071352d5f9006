"""Data with everything in it that a profile should find, small enough to count in plain Python."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from ropewalk.clean.quality import Quality
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.rules import Rule
from ropewalk.clean.step import SPANS, Texts
from ropewalk.data.cleaning import Plan
from ropewalk.data.encode import Options
from ropewalk.data.entry import Prepared, name_sources, prepare_sources

WORDS = "rope walk loose fibre strand long building strong end laid hemp tar spun yarn twist".split()
FOOTER = "All rights reserved by the walk."
SCRIPT = (
    "<script>alert('x')</script><img src=x onerror=alert(1)> \u202e\x1b[31m # # # # rope walk loose fibre"
)


class Addresses:
    """Places of e-mail addresses, a language by the first letter, and signatures that nobody can look at."""

    name = "addresses"
    version = 1
    attributes: Mapping[str, str] = {
        "addresses": "places of e-mail addresses",
        "language": "en, or xx for texts that begin with S",
        "signature": "bytes",
        "signatures": "numbers",
    }

    def settings(self) -> Any:
        return None

    def map(self, texts: Texts) -> pa.Table:
        found = [
            [
                {"start": m.start(), "end": m.end(), "kind": "email"}
                for m in re.finditer(r"\w+@\w+\.org", text)
            ]
            for text in texts.texts
        ]
        return pa.table(
            {
                "addresses": pa.array(found, SPANS),
                "language": pa.array(["xx" if t[:1] == "S" else "en" for t in texts.texts], pa.string()),
                "signature": pa.array([b"\xff"] * len(texts), pa.binary()),
                "signatures": pa.array([[1, 2]] * len(texts), pa.list_(pa.uint64())),
            }
        )


def texts(count: int, seed: int) -> list[str]:
    """Of 2 to 60 words; every fifth ends with the same line, every ninth is one of two."""
    random = Random(seed)
    made = []
    for i in range(count):
        words = [random.choice(WORDS) + str(random.randrange(50)) for _ in range(random.randrange(2, 60))]
        text = " ".join(words).capitalize()
        if i % 5 == 0:
            text += f"\n{FOOTER}"
        if i % 7 == 0:
            text += f"\nWrite to walk{i}@rope.org or to end@rope.org"
        made.append(f"The same text as ever, number {i % 2}, of a rope." if i % 9 == 0 else text)
    return made


def plan(shortest: int = 8) -> Plan:
    return Plan(
        steps=(Quality(), Repetition(), Addresses()),
        rules=(
            Rule("short", f"words >= {shortest}", "too short", "here"),
            Rule("long", "words between 0 and 50 or characters < 10", "too long", "here"),
        ),
        edits={"addresses": "replace"},
    )


def write_sources(folder: Path) -> list[dict[str, str]]:
    first = [*texts(200, 1), SCRIPT, "Das ist schÃ¶n, sagte er, und â€žgutâ€œ war es auch noch."]
    for name, made in (("one.jsonl", first), ("two.jsonl", texts(100, 2))):
        folder.joinpath(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in made))
    return [{"path": str(folder / "one.jsonl")}, {"path": str(folder / "two.jsonl")}]


def prepared(folder: Path, tokenizer: Any, cleaning: Plan | None = None, **options: Any) -> Prepared:
    """The sources, prepared below `folder`."""
    return prepare_sources(
        name_sources(write_sources(folder)),
        [],
        tokenizer,
        Options(**{"sequence_length": 128, "validation_fraction": 0.1, **options}),
        folder / "out",
        plan=plan() if cleaning is None else cleaning,
        workers=1,
    )


def all_texts(folder: Path) -> list[tuple[str, str]]:
    """(id, text) in the order in which they are read."""
    return [
        (f"{name}:{i}", json.loads(line)["text"])
        for name in ("one.jsonl", "two.jsonl")
        for i, line in enumerate((folder / name).read_text().splitlines(), 1)
    ]


def words_in(text: str) -> list[str]:
    """As `clean.words` sees plain words of these texts."""
    return re.findall(r"[^\W_]+", text)
