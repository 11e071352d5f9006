"""Gopher's rules by Ropewalk and by datatrove: documents a second of one core, and how often they agree.

    python bench/data_rules.py FOLDER [--out OUT.json]

FOLDER has the texts (peps.jsonl, rust_book.jsonl, wikitext2_valid.txt, tinyshakespeare.txt). They are cut to
pages of about 2.7 kB; to each third page a fault is done, by a seed, so that every rule drops some. Process
time is measured, reading left out; runs take turns. datatrove stops at the first rule of a filter that drops
a page; Ropewalk writes all measures of all pages and then decides.

Agreement is of each rule alone, in two ways: with datatrove's own words (spaCy's tokenizer), and with
Ropewalk's words given to datatrove. The rest of the difference is then of the rules themselves: datatrove
counts blank lines among the lines, and its repeated n-grams lack the ends of long repeats.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environments import peer_python
from measure import as_json, interleave, machine, measure, median

BENCH = Path(__file__).resolve().parent
SHARED = BENCH.parents[1] / "shared" / "data"
PAGE = 2700
RUNS = 5
ENVIRONMENT = {"PYTHONPATH": str(BENCH.parent / "src"), "OMP_NUM_THREADS": "1"}


def cases(
    directory: Path, texts: Path = SHARED, environments: Path = BENCH, count: int = 1000
) -> list[dict[str, Any]]:
    """Speed (the median of 5 runs) and agreement, entries: case, peer, ours, peer_value, unit, ratio."""
    peer = peer_python("datatrove", environments)
    documents = directory / "documents.jsonl"
    with documents.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in pages(texts, count))

    def run(side: str, mode: str) -> Any:
        python = sys.executable if side == "ropewalk" else peer
        program = BENCH / "sides" / f"rules_{side}.py"
        return measure(side, [python, program, documents, mode], ENVIRONMENT)

    runs = interleave(
        RUNS, {"ropewalk": lambda: run("ropewalk", "time"), "datatrove": lambda: run("datatrove", "time")}
    )
    ours, theirs = (
        median(runs, side, lambda m: m.result["documents_per_s"]) for side in ("ropewalk", "datatrove")
    )
    entries = [entry("gopher rules: speed", ours, theirs, "documents/s of one core")]
    kept = run("ropewalk", "rules").result["kept"]
    for mode, words in (("rules", "own words"), ("rules-same-words", "same words")):
        entries += agreement(kept, run("datatrove", mode).result["kept"], words)
    return entries


def entry(case: str, ours: float, theirs: float, unit: str) -> dict[str, Any]:
    ratio = ours / theirs if theirs else None
    peer = "datatrove 0.10.1"
    return {"case": case, "peer": peer, "ours": ours, "peer_value": theirs, "unit": unit, "ratio": ratio}


def agreement(ours: dict[str, list[bool]], theirs: dict[str, list[bool]], words: str) -> list[dict[str, Any]]:
    """Of each rule: pages dropped by each side, and the share of pages with the same verdict."""
    ours = {**ours, "gopher_symbols": _both(ours["gopher_hashes"], ours["gopher_ellipses"])}
    ours = {name: ours[name] for name in theirs}
    ours["all rules"], theirs = _both(*ours.values()), {**theirs, "all rules": _both(*theirs.values())}
    entries = []
    for name, kept in ours.items():
        same = sum(a == b for a, b in zip(kept, theirs[name], strict=True)) / len(kept)
        one = entry(f"{name}, {words}", kept.count(False), theirs[name].count(False), "pages dropped")
        entries.append({**one, "agreement": same})
    return entries


def _both(*verdicts: list[bool]) -> list[bool]:
    return [all(row) for row in zip(*verdicts, strict=True)]


def pages(directory: Path, count: int) -> list[str]:
    """Pages of about PAGE characters; the same for the same folder and count."""
    rng = random.Random(0)
    found: list[str] = []
    for text in _texts(directory):
        place = 0
        while place < len(text):
            end = text.find("\n", place + PAGE)
            end = len(text) if end < 0 else end
            found.append(text[place:end].strip("\n"))
            place = end
    chosen = rng.sample([page for page in found if page.strip()], count)
    return [rng.choice(FAULTS)(rng, page) if i % 3 == 0 else page for i, page in enumerate(chosen)]


def _texts(directory: Path) -> Iterator[str]:
    for name in ("peps.jsonl", "rust_book.jsonl"):
        for line in (directory / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]
    for name in ("wikitext2_valid.txt", "tinyshakespeare.txt"):
        yield (directory / name).read_text(encoding="utf-8")


def _shorter(rng: random.Random, page: str) -> str:
    return page[: rng.randint(20, 500)]


def _marked(mark: str) -> Callable[[random.Random, str], str]:
    """A mark behind a share of the words."""

    def fault(rng: random.Random, page: str) -> str:
        share = rng.uniform(0.02, 0.25)
        return " ".join(f"{word} {mark}" if rng.random() < share else word for word in page.split(" "))

    return fault


def _lines(before: str, after: str) -> Callable[[random.Random, str], str]:
    """Something before or after a share of the lines."""

    def fault(rng: random.Random, page: str) -> str:
        share = rng.uniform(0.1, 1.1)
        lines = page.split("\n")
        return "\n".join(
            f"{before}{line}{after}" if line and rng.random() < share else line for line in lines
        )

    return fault


def _digits(rng: random.Random, page: str) -> str:
    share = rng.uniform(0.05, 0.5)
    return " ".join(str(rng.randrange(10**4)) if rng.random() < share else w for w in page.split(" "))


def _glued(rng: random.Random, page: str) -> str:
    """Words put together: long ones, and no stop words."""
    share = rng.uniform(0.2, 0.9)
    return "".join(word + ("" if rng.random() < share else " ") for word in page.split())


def _letters(rng: random.Random, page: str) -> str:
    """Words cut to two letters."""
    share = rng.uniform(0.3, 1.0)
    return " ".join(word[:2] if rng.random() < share else word for word in page.split(" "))


def _repeated(separator: str) -> Callable[[random.Random, str], str]:
    """Some of its parts again."""

    def fault(rng: random.Random, page: str) -> str:
        parts = page.split(separator)
        again = rng.choices(parts, k=rng.randint(1, len(parts)))
        return separator.join(parts + again)

    return fault


def _phrase(rng: random.Random, page: str) -> str:
    """One phrase again and again."""
    words = page.split(" ")
    phrase = words[: rng.randint(2, 12)]
    for _ in range(rng.randint(1, 60)):
        place = rng.randrange(len(words) + 1)
        words[place:place] = phrase
    return " ".join(words)


FAULTS: list[Callable[[random.Random, str], str]] = [
    _shorter, _marked("#"), _marked("..."), _lines("- ", ""), _lines("• ", ""), _lines("", "..."), _digits,
    _glued, _letters, _repeated("\n"), _repeated("\n\n"), _repeated(" "), _phrase, _phrase,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--environments", type=Path, default=BENCH, help="folder of the peers' environments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ropewalk-bench-") as directory:
        entries = cases(Path(directory), options.folder, options.environments)
    for one in entries:
        same = f"  {one['agreement']:.2%} alike" if "agreement" in one else ""
        print(f"{one['case']:58} {one['ours']:8.0f} {one['peer_value']:8.0f} {one['unit']}{same}")
    if options.out:
        options.out.write_text(as_json({"machine": machine(), "cases": entries}), encoding="utf-8")


if __name__ == "__main__":
    main()
