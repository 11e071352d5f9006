"""The schema seen as dotted names: what may stand at a key, in plain words, and which name is closest."""

import types
import typing
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, Union

from pydantic.fields import FieldInfo

from ropewalk.recipe.document import Key, dotted
from ropewalk.recipe.schema import Recipe, Section

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


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated` and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return bare(typing.get_args(annotation)[0])
    if _is_union(annotation):
        kept = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return bare(kept[0]) if len(kept) == 1 else annotation
    return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that stands at a field, or in each item of its list."""
    kind = bare(annotation)
    if typing.get_origin(kind) is tuple:
        kind = bare(typing.get_args(kind)[0])
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def is_list(annotation: Any) -> bool:
    return typing.get_origin(bare(annotation)) is tuple


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Every field of a recipe by its dotted name; items of a list are named `0`."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            yield prefix + name, field
            inner = section_of(field.annotation)
            if inner is not None:
                yield from walk(inner, f"{prefix}{name}.{'0.' if is_list(field.annotation) else ''}")

    return dict(walk(Recipe, ""))


def field_at(key: Key) -> FieldInfo | None:
    return all_fields().get(dotted(tuple(0 if isinstance(part, int) else part for part in key)))


def suggest(key: Key) -> str | None:
    """The field that an unknown key most probably means, anywhere in the tree; None: nothing is close."""
    last, parent = str(key[-1]), dotted(key[:-1])
    if last in SYNONYMS:
        return SYNONYMS[last]
    pattern = dotted(tuple(0 if isinstance(part, int) else part for part in key[:-1]))
    best, best_score = None, 0.72
    for name in all_fields():
        above, _, leaf = name.rpartition(".")
        # A key of the same section need be less alike to be meant.
        score = SequenceMatcher(None, last, leaf).ratio() + (0.12 if above == pattern else 0.0)
        if score > best_score:
            best, best_score = (f"{parent}.{leaf}" if above == pattern and parent else name), score
    return best


def wanted(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What a field takes, in plain words: "a whole number above 0", "one of cosine, linear"."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        found = [m for item in more for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return wanted(inner, found + (metadata or []))
    if _is_union(annotation):
        choices = [a for a in typing.get_args(annotation) if a is not type(None)]
        return " or ".join(wanted(choice, metadata) for choice in choices)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each item {wanted(arguments[0])}"
    if origin is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a section with {', '.join(annotation.model_fields)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(annotation, str(annotation)) + _bounds(metadata or [])


def _bounds(metadata: list[Any]) -> str:
    said = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    parts = [
        f"{word} {getattr(m, name):g}"
        for m in metadata
        for name, word in said.items()
        if getattr(m, name, None) is not None
    ]
    patterns = [m.pattern for m in metadata if getattr(m, "pattern", None)]
    return (" " + " and ".join(parts) if parts else "") + (f" that matches {patterns[0]}" if patterns else "")
