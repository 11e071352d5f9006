"""Commands in the documentation are commands that exist, on files that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from ropewalk.cli import app
from ropewalk.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PLANNED = {"sweep", "compress", "export", "serve", "board"}
"""Designed, and named in docs/architecture.md only."""


def code_lines(path: Path) -> list[str]:
    """Lines of fenced blocks, without prompt."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]


def commands(*starts: str) -> list[tuple[Path, str]]:
    found = [(page, line) for page in PAGES for line in code_lines(page)]
    for recipe in sorted(ROOT.glob("recipes/*.yaml")):
        lines = recipe.read_text().splitlines()
        found += [(recipe, line.lstrip("# ").strip()) for line in lines if line.startswith("#")]
    plain = [(page, line.removeprefix(".venv/bin/")) for page, line in found]
    return [(page, line) for page, line in plain if line.startswith(starts)]


def shown(value: object) -> str:
    return str(value)[-60:]


def words_of(line: str) -> list[str]:
    """A shell line's words up to a comment: `#`, or the two spaces that set off an explanation."""
    return shlex.split(re.split(r"\s{2,}", line)[0], comments=True)


@pytest.mark.parametrize(("page", "line"), commands("ropewalk "), ids=shown)
def test_ropewalk_lines_parse(page, line):
    command = typer.main.get_command(app)
    words = words_of(line)[1:]
    if words and words[0] in PLANNED and page.name == "architecture.md":
        pytest.skip("planned, and the page says so")
    path = ["ropewalk"]
    while words and hasattr(command, "commands"):
        default = getattr(command, "default", None)
        if words[0].startswith("-") and default is None:
            break
        names = words.pop(0)
        if default is not None and names not in command.commands:  # `plan RECIPE` beside `plan fit RUNS`
            words.insert(0, names)
            names = default
        if "|" in names:  # runs ls|show|diff
            assert all(name in command.commands for name in names.split("|")), line
            return
        assert names in command.commands, f"{page.name}: no command {' '.join([*path, names])}"
        path.append(names)
        command = command.commands[names]
    options = {name for parameter in command.params for name in getattr(parameter, "opts", ())} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{page.name}: {' '.join(path)} has no {word}"
    recipes = [word for word in words if re.fullmatch(r"recipes/[\w-]+\.yaml", word)]
    for recipe in recipes:
        overrides = [word for word in words if re.fullmatch(r"[a-z_0-9.]+=.*", word)]
        load_recipe(ROOT / recipe, overrides)


def test_there_are_commands_to_check():
    assert len(commands("ropewalk ")) >= 5


@pytest.mark.parametrize(("page", "line"), commands("make "), ids=shown)
def test_make_lines_name_targets(page, line):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words_of(line)[1:]:
        assert "=" in word or word in targets, f"{page.name}: make {word}"


@pytest.mark.parametrize(
    ("page", "line"), commands("python ", "python3 "), ids=lambda value: str(value)[-60:]
)
def test_python_lines_name_files(page, line):
    words = words_of(line)
    if len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{page.name}: {words[1]}"


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
