"""The schema seen as dotted names: what may stand at a key, in plain words, and which name is closest."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from ropewalk.recipe.document import Key, dotted
from ropewalk.recipe.schema import Recipe

# What other tools call our fields; closeness of letters would not find these.
SYNONYMS = {
    "lr": "train.optimizer.learning_rate",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "gradient_checkpointing": "train.checkpointing",
    "activation_checkpointing": "train.checkpointing",
    "activation_memory_budget": "train.checkpointing_budget",
    "budget": "train.checkpointing_budget",
    "load_in_4bit": "adapt.quantize",
    "load_in_8bit": "adapt.quantize",
    "use_dora": "adapt.method",
    "use_rslora": "adapt.rank_stabilized",
    "loraplus_lr_ratio": "adapt.b_rate",
    "num_virtual_tokens": "adapt.tokens",
    "optim": "train.optimizer.name",
    "max_grad_norm": "train.clip",
    "grad_clip": "train.clip",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.evaluate_every",
    "max_seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "block_size": "data.sequence_length",
    "target_modules": "adapt.targets",
    "lora_alpha": "adapt.alpha",
    "r": "adapt.rank",
    "model_name_or_path": "model.source",
    "output_dir": "runs",
}

# What other tools have as one choice and we as two fields.
ALIASES = {
    "qlora": "lora, with adapt.quantize: nf4",
    "rslora": "lora, with adapt.rank_stabilized: true",
    "lora+": "lora, with adapt.b_rate: 16",
    "loraplus": "lora, with adapt.b_rate: 16",
    "adamw_8bit": "adamw, with train.optimizer.state_bits: 8",
    "adamw8bit": "adamw, with train.optimizer.state_bits: 8",
    "fp8": "float8",
    "bf16": "bfloat16",
}


Schema = dict[str, Any]
"""JSON Schema of a field, as pydantic gives it, with what it refers to put in place."""

WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


@cache
def all_fields() -> dict[str, Schema]:
    """Every field of a recipe by its dotted name; items of a list are named `0`."""
    whole = Recipe.model_json_schema()

    def put_in_place(part: Any) -> Any:
        if isinstance(part, list):
            return [put_in_place(item) for item in part]
        if not isinstance(part, dict):
            return part
        named = whole["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else {}
        return {key: put_in_place(value) for key, value in {**named, **part}.items()}

    def walk(section: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
        for name, field in section.get("properties", {}).items():
            yield prefix + name, field
            for kind in _kinds(field):
                yield from walk(kind, f"{prefix}{name}.")
                yield from walk(kind.get("items", {}), f"{prefix}{name}.0.")

    return dict(walk(put_in_place({"properties": whole["properties"]}), ""))


def _kinds(field: Schema) -> list[Schema]:
    """What may stand at a field, but nothing (null)."""
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]


def field_at(key: Key) -> Schema:
    """The field at a place, or what an item of its list or mapping is; empty where there is none."""
    fields = all_fields()
    if (name := _pattern(key)) in fields:
        return fields[name]
    for kind in _kinds(fields.get(_pattern(key[:-1]), {})):
        if found := kind.get("items") or kind.get("additionalProperties"):
            return dict(found)
    return {}


def _pattern(key: Key) -> str:
    return dotted(tuple(0 if isinstance(part, int) else part for part in key))


def suggest(key: Key) -> str | None:
    """The field that an unknown key most probably means, anywhere in the tree; None: nothing is close."""
    last, parent, pattern = str(key[-1]), dotted(key[:-1]), _pattern(key[:-1])
    if last in SYNONYMS:
        return SYNONYMS[last]
    best, best_score = None, 0.72
    for name in all_fields():
        above, _, leaf = name.rpartition(".")
        # A key of the same section need be less alike to be meant.
        score = SequenceMatcher(None, last, leaf).ratio() + (0.12 if above == pattern else 0.0)
        if score > best_score:
            best, best_score = (f"{parent}.{leaf}" if above == pattern and parent else name), score
    return best


def choices(field: Schema) -> list[str]:
    """The words that a field takes, where it takes one of several."""
    return [str(choice) for kind in _kinds(field) for choice in kind.get("enum", ())]


def wanted(field: Schema) -> str:
    """What a field takes, in plain words: "a whole number above 0", "one of cosine, linear"."""
    return " or ".join(map(_wanted, _kinds(field)))


def _wanted(kind: Schema) -> str:
    if "enum" in kind:
        return f"one of {', '.join(map(str, kind['enum']))}"
    if "const" in kind:
        return str(kind["const"])
    if "properties" in kind:
        return f"a section with {', '.join(kind['properties'])}"
    if kind["type"] == "array":
        most = ", at least one of them" if "minItems" in kind else ""
        return f"a list, each item {wanted(kind['items'])}{most}"
    if kind["type"] == "object":
        return "a mapping"
    bounds = " and ".join(f"{word} {_said(kind[name])}" for name, word in BOUNDS.items() if name in kind)
    pattern = f"that matches {kind['pattern']}" if "pattern" in kind else ""
    return " ".join(filter(None, (WORDS[kind["type"]], bounds, pattern)))


def _said(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
