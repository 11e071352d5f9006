"""Who may import whom, how long files may be, and what must not be written in them."""

import ast
import re
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ropewalk"

LOW = {"model", "ops", "adapt", "parallel"}
STAGES = set(
    "clean data look train launch align evaluate plan sweep compress export serve board compare".split()
)
LEAVES = {"errors", "files", "layout", "stage"}
"""Single modules that everybody may use."""
WHOLE_LANE = {"cli", "lane", "ablate", "doctor"}
"""What stands above the rooms; nothing below may import it."""
MAY_USE_RECIPE_AND_TRACK = {
    "data": {"entry"},
    "evaluate": {"entry"},
    "launch": {"entry"},
    "plan": {"entry", "here", "runs", "work"},
    "train": {
        "entry",
        "autopsy",
        "job",
        "build",
        "loop",
        "report",
        "recover",
        "together",
        "goodput",
        "layout_parity",
        "provenance",
    },
}
"""Entry modules of a stage room: what is below them takes plain values."""


UPWARDS = {
    ("model.load", "adapt"),
    ("train.entry", "plan"),
    ("train.flops", "plan.hardware"),
    ("clean.perplexity", "evaluate.perplexity"),
}
"""Deferred imports against the order: a run that trained adapters is a source of `load_model`; a run keeps
what was planned of it, the planner knows the training step, and has the table of peaks; how well a model
foresees a text is a measure of the model and of the text."""


def modules() -> dict[str, Path]:
    """`train.entry` -> its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Names inside ropewalk that a file imports when it runs, at its top or in a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(name.name for name in node.names if name.name.split(".")[0] == "ropewalk")

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ropewalk":
                found.update(f"ropewalk.{name.name}" for name in node.names)
            elif node.module and node.module.startswith("ropewalk."):
                found.add(node.module)

    Visitor().visit(tree)
    return {name.removeprefix("ropewalk").lstrip(".") for name in found} - {"make_callable", "__version__"}


def room(module: str) -> str:
    return module.split(".")[0]


EDGES = [(module, target) for module, path in modules().items() for target in imports(path)]


def allowed(source: str, target: str) -> bool:
    here, there = room(source), room(target)
    if here == there or there in LEAVES:
        return True
    if here in WHOLE_LANE:
        return True
    if there in ("recipe", "track"):
        return source.partition(".")[2] in MAY_USE_RECIPE_AND_TRACK.get(here, set())
    if here in LOW:
        return there in LOW
    if here in STAGES:
        return there in LOW | STAGES
    return False  # recipe, track and the leaves use leaves only


def test_imports_go_downwards_only():
    assert EDGES
    wrong = [f"{source} imports {target}" for source, target in EDGES if not allowed(source, target)]
    assert wrong == []


def test_no_cycles_between_rooms():
    graph = defaultdict(set)
    for source, target in EDGES:
        if room(source) != room(target) and target and (source, target) not in UPWARDS:
            graph[room(source)].add(room(target))
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join((*path[path.index(node) :], node))
        if node not in done:
            for other in sorted(graph[node]):
                visit(other, (*path, node))
            done.add(node)

    for start in sorted(graph):
        visit(start, ())
    assert set(EDGES) >= UPWARDS  # no exception that nobody needs


def test_every_room_says_what_it_is():
    """Each __init__ has a docstring; that of a room says what it may import."""
    for path in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert "May import" in text, path


def test_files_and_the_whole_stay_within_their_budgets():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: n for path, n in lines.items() if n > 400} == {}
    assert sum(lines.values()) <= 43_250


def tracked_files() -> list[Path]:
    """Text files of the project: what git has or would take."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file()]


FORBIDDEN = {
    "a path of one machine": r"/(?:root|home|Users|work|opt/wheels)/[\w.-]+",
    "a package index's host": r"\b(?:files\.python[h]osted|[p]ypi\.(?:org|python))\b|--(?:extra-)?index-url",
    "a debugger": r"\bbreakpoint\(\)|\bpdb\.set_trace",
}


def test_nothing_is_tied_to_one_machine():
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            found += [f"{path.relative_to(ROOT)}: {what}: {m.group()}" for m in re.finditer(pattern, text)]
    assert found == []


def test_whatever_is_no_python_is_packaged_too():
    """An editable installation has all files; one from a wheel has those that are named."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["ropewalk"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    ours = {path for path in tracked_files() if PACKAGE in path.parents and path.suffix != ".py"}
    assert ours <= packaged


def test_no_unsafe_loading_of_files_from_elsewhere():
    """No pickle, no remote code, no full YAML loader, anywhere in the package."""
    pattern = (
        r"trust_remote_code\s*=\s*True|\bpickle\.|import pickle"
        r"|weights_only\s*=\s*False|yaml\.(?:unsafe_)?load\("
    )
    found = [
        f"{name}: {match.group()}"
        for name, path in modules().items()
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"))
    ]
    assert found == []
