"""Tokenizers of Hugging Face directories, as transformers' fast class around `tokenizers`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.errors import UserError
from ropewalk.model.source import base_of_adapter, expanded, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    source: str | Path, revision: str | None = None, chat_template: str | Path | None = None
) -> "PreTrainedTokenizerFast":
    """The tokenizer that goes with the model `source` (see `resolve_source`), with its chat template.

    `chat_template` is the path of a Jinja template that takes that one's place. A directory that holds a
    tokenizer and no model will do too, for models from scratch. An adapter without a tokenizer of its own
    has its base model's. No code from the directory is run, and chat templates run in transformers' Jinja
    sandbox. Raises UserError when there is none or it is damaged.
    """
    tokenizer = _load(source, revision)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: {chat_template}: {error}") from None
    return tokenizer


def _load(source: str | Path, revision: str | None) -> "PreTrainedTokenizerFast":
    directory = expanded(source)
    if not os.path.isfile(directory / "tokenizer.json"):
        directory = resolve_source(source, revision)
    base = base_of_adapter(directory)
    if base is not None and not (directory / "tokenizer_config.json").is_file():
        return _load(*base)
    if (directory / "tokenizer.json").is_file():
        return _from_json(directory)
    return _from_vocabulary(directory)


def _from_json(directory: Path) -> "PreTrainedTokenizerFast":
    """tokenizer.json as it is written. AutoTokenizer would first import half of transformers (three seconds),
    and then, for some model types, build another tokenizer from the vocabulary in this one."""
    from transformers import PreTrainedTokenizerFast

    try:
        settings = directory / "tokenizer_config.json"
        if settings.is_file():
            json.loads(settings.read_text(encoding="utf-8"))
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exception for everything
        raise UserError(f"{directory}: its tokenizer cannot be loaded: {_first_line(error)}") from None


def _from_vocabulary(directory: Path) -> "PreTrainedTokenizerFast":
    """Older directories without tokenizer.json: transformers converts what they have."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = ("tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")
    if not any((directory / name).is_file() for name in files):
        raise UserError(f"{directory}: it has no tokenizer (tokenizer.json); name one in model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UserError(f"{directory}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: its tokenizer has no fast form; save it with tokenizer.json")
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
