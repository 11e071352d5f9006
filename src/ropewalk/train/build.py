"""The model of a run, in the fixed order: weights, adapters, activation checkpointing, per-block compile."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ropewalk.adapt import LoraConfig, apply_lora, save_adapter
from ropewalk.errors import UserError
from ropewalk.model import Transformer, from_config, load_model, load_tokenizer, save_model
from ropewalk.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Built:
    """A model ready for training, and how to write what was trained of it."""

    model: Transformer
    tokenizer: Any
    adapted: tuple[str, ...]
    """names of the modules that carry an adapter; none where every weight is trained"""
    source: str
    """where its first weights came from"""
    revision: str | None = None

    def save(self, path: Path) -> None:
        """A PEFT adapter directory for LoRA, else a Hugging Face directory; with the tokenizer either way."""
        if self.adapted:
            save_adapter(self.model, path, self.source, revision=self.revision)
            self.tokenizer.save_pretrained(path)
        else:
            save_model(self.model, self.tokenizer, path)

    def trainable(self) -> int:
        """Number of trained parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def build(recipe: Recipe, device: torch.device, checkpoint: Path | None = None) -> Built:
    """The model of a resolved recipe, with the weights of `checkpoint` where it holds whole ones.

    Adapters are not loaded here: the optimizer's state holds them exactly. From here on torch's global
    generators are seeded; they only serve dropout.
    """
    dtype = recipe.train.precision
    lora = recipe.adapt.method == "lora"
    if lora and recipe.model.source is None:
        raise UserError("adapt.method: lora adapts a pretrained model; give model.source, or set it to full")
    if checkpoint is not None and not lora:
        model = load_model(checkpoint, dtype=dtype, device=str(device))
    elif recipe.model.source is not None:
        model = load_model(
            recipe.model.source, dtype=dtype, device=str(device), revision=recipe.model.revision
        )
    else:
        assert recipe.model.config is not None
        model = from_config(recipe.model.config, seed=recipe.seed).to(device=device, dtype=DTYPES[dtype])
    adapted: list[str] = []
    if lora:
        adapt = recipe.adapt
        config = LoraConfig(adapt.rank, adapt.alpha or 2.0 * adapt.rank, adapt.dropout, adapt.targets)
        adapted = apply_lora(model, config, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    model.train()
    model.checkpointing = recipe.train.checkpointing == "full"
    if recipe.train.compile:
        _compile(model)
    origin = recipe.model.tokenizer or recipe.model.source
    assert origin is not None  # the recipe's own check
    tokenizer = load_tokenizer(origin, recipe.model.revision, recipe.data.chat_template)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"model.tokenizer: {recipe.model.tokenizer} has {len(tokenizer):,} tokens, but the model has "
            f"room for {model.config.vocab_size:,}; take the model's own tokenizer or a larger vocab_size"
        )
    source = recipe.model.source if recipe.model.source is not None else "from scratch"
    return Built(model, tokenizer, tuple(adapted), source, recipe.model.revision)


def _compile(model: nn.Module) -> None:
    """In place, block by block: all blocks are the same graph, which so is compiled once, not per layer."""
    for block in model.get_submodule("blocks").children():
        block.compile()
