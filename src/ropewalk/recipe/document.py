"""A recipe's text as plain values that remember where they were written.

Reads YAML through its composed nodes (never through constructors, so no tag can run anything),
with the YAML 1.2 idea of a scalar: `1e-4` is a number, `no` and `off` are text, `010` is ten.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ropewalk.errors import UserError

Key = tuple[str | int, ...]
"""Place in a recipe: ("data", "train", 0, "path")."""

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # aliases can name one node a billion times
MAX_DEPTH = 32


@dataclass(frozen=True)
class Origin:
    """Where a value of a recipe comes from."""

    kind: Literal["default", "file", "given", "override", "derived"]
    where: str = ""
    """`recipes/x.yaml:14`, or the override as it was typed."""
    why: str = ""
    """What a derived value was derived from."""


@dataclass
class Document:
    """Values, where each was written, and what is already known to be wrong with them."""

    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, Origin] = field(default_factory=dict)
    raw: dict[Key, str] = field(default_factory=dict)
    """text as written: of unquoted scalars, and of overrides"""
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """` (recipes/x.yaml:14)` for a key or, where it was not written, for the section around it."""
        while key and key not in self.where:
            key = key[:-1]
        text = self.where[key].where if key in self.where else self.name
        return f" ({text})" if text else ""


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


# --- YAML ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


_TAG = "tag:yaml.org,2002:"
_INTEGER = r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# In this order: an integer also matches the pattern of a float.
SCALARS = [
    (_TAG + name, re.compile(f"^(?:{pattern})$"), first)
    for name, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", _INTEGER, list("-+0123456789")),
        ("float", _FLOAT, list("-+.0123456789")),
    )
]
"""(tag, pattern, first characters) of what is no text"""
for _resolver in SCALARS:
    _Loader.add_implicit_resolver(*_resolver)


def _scalar(tag: str, text: str) -> Any:
    match tag.removeprefix(_TAG):
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 16) if text.startswith("0x") else int(text)
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        case _:
            raise ValueError(f"the tag {tag.replace(_TAG, '!!')} is not allowed in a recipe")


class _Reader:
    """Turns composed nodes into values, filling a Document on the way."""

    def __init__(self, document: Document, override: str | None = None) -> None:
        self.document = document
        self.override = override
        self.nodes = 0

    def where(self, node: yaml.Node) -> Origin:
        if self.override is not None:
            return Origin("override", f"override {self.override}")
        return Origin("file", f"{self.document.name}:{node.start_mark.line + 1}")

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            raise UserError(
                f"{self.document.name}: too deep or too large for a recipe (aliases that repeat?)"
            )
        # A section's place is the line of its key, already noted; a list's and a scalar's is its own.
        if not (isinstance(node, yaml.MappingNode) and key in self.document.where):
            self.document.where[key] = self.where(node)
        if isinstance(node, yaml.MappingNode):
            return dict(self.pairs(node, key))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            self.document.raw[key] = node.value
        try:
            return _scalar(node.tag, node.value)
        except ValueError as error:
            self.document.problems.append(f"{dotted(key)}: {error} ({self.where(node).where})")
            return node.value

    def pairs(self, node: yaml.MappingNode, key: Key) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self.document.problems.append(f"a key must be text ({self.where(name).where})")
            elif name.value == "<<" and name.style is None:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif name.value in seen:
                first, place = seen[name.value], self.where(name).where
                self.document.problems.append(
                    f"{dotted((*key, name.value))}: given twice, first on line {first} ({place})"
                )
            else:
                seen[name.value] = name.start_mark.line + 1
                yield self.pair(name, value, key)
        for other in merged:  # `<<: *anchor`: what is not written here is taken from there, nearest first
            if not isinstance(other, yaml.MappingNode):
                self.document.problems.append(f"<< must be followed by a section ({self.where(other).where})")
                continue
            for name, value in other.value:
                if isinstance(name, yaml.ScalarNode) and name.value not in seen:
                    seen[name.value] = name.start_mark.line + 1
                    yield self.pair(name, value, key)

    def pair(self, name: yaml.ScalarNode, value: yaml.Node, key: Key) -> tuple[str, Any]:
        here = (*key, name.value)
        self.document.where[here] = self.where(name)
        return name.value, self.value(value, here)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


_HINTS = {
    "cannot start any token": "a tab is no indentation, use spaces; text that begins so needs quotes",
    "mapping values are not allowed": "text that contains a colon and a space needs quotes",
}


def _yaml_problem(error: yaml.YAMLError, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        hint = "".join(f"; {hint}" for sign, hint in _HINTS.items() if sign in what)
        return f"broken YAML: {what}{hint} ({name}:{mark.line + 1}, column {mark.column + 1})"
    return f"broken YAML: {' '.join(str(error).split())} ({name})"


def read_file(path: str | Path) -> Document:
    """The document in a YAML (or JSON) file; UserError where there is none to read."""
    name = str(path)
    file = Path(path)
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder; a recipe is a YAML file")
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{name} has {file.stat().st_size:,} bytes; a recipe is a small YAML file")
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file{_similar(file)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (at byte {error.start}); a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None

    document = Document(name)
    try:
        node = _compose(text)
    except yaml.YAMLError as error:
        raise UserError(_yaml_problem(error, name)) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"):
        raise UserError(f"{name} is empty; a recipe needs name, model, data and train")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "plain text"
        raise UserError(f"the top level must be keys (name:, model:, data:, train:), not {kind} ({name}:1)")
    document.where[()] = Origin("file", name)
    document.values = _Reader(document).value(node, ())
    return document


def _similar(file: Path) -> str:
    """`; did you mean ...?` with the recipe whose name is closest, here or in recipes/."""
    import difflib

    found = [p for folder in (file.parent, Path("recipes")) for p in folder.glob("*.y*ml")]
    names = {p.stem: str(p) for p in reversed(found)}
    close = difflib.get_close_matches(file.stem, names, 1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def from_mapping(values: Mapping[str, Any]) -> Document:
    """The document of a Python dictionary."""
    document = Document()

    def copy(value: Any, key: Key) -> Any:
        document.where[key] = Origin("given")
        if isinstance(value, Mapping):
            return {str(k): copy(v, (*key, str(k))) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [copy(v, (*key, i)) for i, v in enumerate(value)]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    document.values = copy(values, ())
    return document


# --- overrides -------------------------------------------------------------------------------


def apply_overrides(document: Document, overrides: Sequence[str], exclusive: Sequence[Sequence[str]]) -> None:
    """Lay `a.b=c` strings over a document, in place; what is wrong with them joins its problems.

    Values are YAML scalars, lists or mappings; `data.train.0.path` reaches into a list, and one past its
    end appends. Of a group of names in `exclusive`, the one on the command line removes the others.
    """
    given: list[Key] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            document.problems.append(f"{text}: an override is written key=value, for example train.steps=100")
            continue
        key: Key = tuple(int(part) if part.isdecimal() else part for part in parts)
        try:
            _put(document, key, value.strip(), text)
        except ValueError as error:
            document.problems.append(f"{name}: {error} (override {text})")
            continue
        given.append(key)
    for group in exclusive:
        keys = [tuple(name.split(".")) for name in group]
        if any(key in given for key in keys):
            for section, name in (key for key in keys if key not in given):
                if isinstance(document.values.get(section), dict):
                    document.values[section].pop(name, None)
                document.where.pop((section, name), None)


def _put(document: Document, key: Key, text: str, override: str) -> None:
    holder: Any = document.values
    for i, part in enumerate(key[:-1]):
        part = _slot(holder, part, key[:i])
        fresh: Any = [] if isinstance(key[i + 1], int) else {}
        if isinstance(holder, list):
            if part == len(holder):
                holder.append(fresh)
        elif holder.get(part) is None:
            holder[part] = fresh
        holder = holder[part]
        document.where.setdefault(key[: i + 1], Origin("override", f"override {override}"))
    last = _slot(holder, key[-1], key[:-1])
    for known in (document.where, document.raw):
        for old in [k for k in known if k[: len(key)] == key]:
            del known[old]
    value = _override_value(document, key, text, override)
    document.where[key], document.raw[key] = Origin("override", f"override {override}"), text
    if isinstance(holder, list) and last == len(holder):
        holder.append(value)
    else:
        holder[last] = value


def _slot(holder: Any, part: str | int, key: Key) -> Any:
    """`part` as an index of `holder`, which was found at `key`; ValueError where it is none."""
    if isinstance(holder, dict):
        return str(part)
    if not isinstance(holder, list):
        raise ValueError(f"{dotted(key)} is a single value; it has no {part}")
    if not isinstance(part, int):
        raise ValueError(f"{dotted(key)} is a list; say which item, as in {dotted((*key, 0))}")
    if part > len(holder):
        raise ValueError(f"{dotted(key)} has {len(holder)} items (the first is {dotted((*key, 0))})")
    return part


def _override_value(document: Document, key: Key, text: str, override: str) -> Any:
    """The YAML value of the text; text that is no YAML, or is cut by a ` #`, stands for itself."""
    try:
        node = _compose(text)
    except yaml.YAMLError:
        node = None
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if node is None or (plain and node.value != text):
        return text or None
    return _Reader(document, override).value(node, key)
