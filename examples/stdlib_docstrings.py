"""Make the quickstart's data set from the standard library of the Python that runs this.

Every function or method with a one-line docstring becomes a conversation: its source without the
docstring is the question, the docstring the answer. Whole modules are held out for validation, and
training functions that equal or nearly equal a held-out one are removed, so that a score on the
validation file measures writing docstrings and not memory.

    python examples/stdlib_docstrings.py [--out data/stdlib-docstrings]

writes train.jsonl and validation.jsonl (rows: messages, module, function) and prints the counts.
Needs nothing but the standard library.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import sysconfig
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Write the one-line docstring of this Python function."
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "__pycache__",
    "turtledemo",
}
FUNCTION_CHARACTERS = (60, 800)
DOCSTRING_CHARACTERS = (15, 100)
HELD_OUT = 0.12  # share of modules
FROM_ONE_MODULE = 40  # held-out functions at most, so that no module is the score
NEAR = 0.7  # share of common 4-grams from which two functions count as the same


def functions(path: Path, module: str) -> Iterator[dict]:
    """Rows of the functions of one file that have a usable docstring."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = first_line(ast.get_docstring(node))
        if docstring is None:
            continue
        # The text itself, comments and all, less the lines of the docstring. Where the docstring shares
        # a line with other code, cutting lines would cut code: such a function is left out.
        doc = node.body[0]
        above = max(
            [node.lineno, *(a.end_lineno or 0 for a in ast.walk(node.args) if hasattr(a, "end_lineno"))]
        )
        if doc.lineno <= above or node.body[1].lineno <= (doc.end_lineno or 0):
            continue
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        body = "".join(lines[doc.end_lineno : node.end_lineno]).lstrip("\n")
        code = textwrap.dedent(("".join(lines[start : doc.lineno - 1]) + body).expandtabs(4)).strip()
        if FUNCTION_CHARACTERS[0] <= len(code) <= FUNCTION_CHARACTERS[1] and docstring not in code:
            yield {"module": module, "function": node.name, "code": code, "docstring": docstring}


def first_line(docstring: str | None) -> str | None:
    """The summary line, where the docstring has one that stands alone and is a sentence in words."""
    if not docstring:
        return None
    head, _, rest = docstring.strip().partition("\n")
    head = head.strip()
    if rest.strip() and rest.partition("\n")[0].strip():
        return None  # the first sentence runs on over several lines
    words = re.findall(r"[A-Za-z]{2,}", head)
    if not (DOCSTRING_CHARACTERS[0] <= len(head) <= DOCSTRING_CHARACTERS[1] and len(words) >= 3):
        return None
    if not head.isascii() or not head[0].isupper() or head[-1] != "." or re.match(r"\w+\(", head):
        return None  # a signature, a fragment, another language
    return head


def held_out(module: str) -> bool:
    """Whether a module is for validation: fixed by its name, whatever else is in the library."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT


def grams(row: dict) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", row["code"] + " " + row["docstring"])
    return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))}


def without_near_duplicates(train: list[dict], validation: list[dict]) -> tuple[list[dict], int]:
    """`train` less rows that answer as a validation row does or are `NEAR` like one (Jaccard of 4-grams)."""
    answers = {row["docstring"] for row in validation}
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for index, row in enumerate(validation):
        found = grams(row)
        sizes.append(len(found))
        for gram in found:
            having[gram].append(index)
    kept = []
    for row in train:
        if row["docstring"] in answers:
            continue
        mine = grams(row)
        common = Counter(index for gram in mine for index in having.get(gram, ()))
        if all(n / (len(mine) + sizes[index] - n) < NEAR for index, n in common.items()):
            kept.append(row)
    return kept, len(train) - len(kept)


def unique(rows: list[dict]) -> list[dict]:
    """One row per code, and no docstring more than three times (overrides say the same thing)."""
    codes: set[str] = set()
    docstrings: Counter[str] = Counter()
    kept = []
    for row in rows:
        docstrings[row["docstring"]] += 1
        if row["code"] not in codes and docstrings[row["docstring"]] <= 3:
            kept.append(row)
        codes.add(row["code"])
    return kept


def conversation(row: dict) -> dict:
    question = f"{INSTRUCTION}\n\n```python\n{row['code']}\n```"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["docstring"]},
        ],
        "module": row["module"],
        "function": row["function"],
    }


def write(path: Path, rows: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(conversation(row), ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/stdlib-docstrings"))
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")))
    arguments = parser.parse_args()

    rows = []
    for path in sorted(arguments.library.rglob("*.py")):
        parts = path.relative_to(arguments.library).parts
        if not SKIPPED.intersection(parts):
            rows += functions(path, module=".".join(parts).removesuffix(".py").removesuffix(".__init__"))
    rows = unique(rows)
    # An order that mixes modules, so that the first rows are a fair sample of all.
    rows.sort(key=lambda row: hashlib.sha256(row["code"].encode()).hexdigest())
    seen: Counter[str] = Counter()
    train, validation = [], []
    for row in rows:
        if not held_out(row["module"]):
            train.append(row)
            continue
        seen[row["module"]] += 1
        if seen[row["module"]] <= FROM_ONE_MODULE:
            validation.append(row)
    train, removed = without_near_duplicates(train, validation)
    if not train or not validation:
        raise SystemExit(
            f"error: no functions with docstrings under {arguments.library}: is its source installed?"
        )

    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "train.jsonl", train)
    write(arguments.out / "validation.jsonl", validation)
    modules = len({row["module"] for row in train}), len({row["module"] for row in validation})
    print(
        f"{arguments.out}: {len(train)} functions of {modules[0]} modules to train on, {len(validation)} of "
        f"{modules[1]} others held out ({removed} copies or near copies of held-out functions removed)"
    )


if __name__ == "__main__":
    main()
