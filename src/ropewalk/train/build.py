"""The model of a run, in the fixed order: weights, adapters, float8, saved activations, compiled blocks."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.adapt import AdapterConfig, apply_adapter, freeze, read_parameters, save_adapter, unmerged
from ropewalk.errors import UserError
from ropewalk.model import (
    ModelConfig,
    Transformer,
    config_from_fields,
    from_config,
    load_model,
    load_tokenizer,
    read_config,
    resolve_source,
    save_model,
)
from ropewalk.parallel import local
from ropewalk.recipe import Recipe
from ropewalk.train.activations import save_activations
from ropewalk.train.compiling import compile_blocks, use_float8
from ropewalk.train.pipelined import without_values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}


@dataclass(frozen=True)
class Built:
    """A model ready for training, and how to write what was trained of it."""

    model: Transformer
    whole: Transformer
    """the same one, or, where this process keeps some of its blocks or experts, all of it without values"""
    tokenizer: Any
    adapted: tuple[str, ...]
    """names of what an adaptation method trains: modules, or biases; none where every weight is trained"""
    source: str
    """where its first weights came from"""
    parameters: int
    """of the whole model, also where a process has slices; a tied matrix counts once"""
    trainable: int
    """so many of them are trained"""
    revision: str | None = None

    def save(self, path: Path, values: Callable[[str], Tensor]) -> None:
        """An adapter directory where there are adapters, else a Hugging Face one; with the tokenizer.

        `values` gives the parameters of `saved` by name, whole.
        """

        def typed(name: str) -> Tensor:
            value, dtype = values(name), self.whole.get_parameter(name).dtype
            return value if value.dtype == dtype else value.to(dtype)  # a master of blocks that are not here

        if unmerged(self.whole):
            save_adapter(self.whole, path, self.source, revision=self.revision, values=typed)
            self.tokenizer.save_pretrained(path)
        else:
            save_model(self.whole, self.tokenizer, path, values=typed)

    def weight_bytes(self) -> int:
        """Of the parameters that this process has; a quantized one as it is kept."""
        total = 0
        for parameter in map(local, self.model.parameters()):
            inner = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else None
            total += sum(getattr(parameter, name).nbytes for name in inner) if inner else parameter.nbytes
        return total

    def saved(self) -> list[str]:
        """Names of the parameters that `save` writes or reads."""
        here = [name for name, _ in self.model.named_parameters()]
        return (
            [name for name in read_parameters(self.model) if name in here] if unmerged(self.whole) else here
        )

    def elsewhere(self) -> set[str]:
        """Names of the parameters that only other processes have."""
        here = {name for name, _ in self.model.named_parameters()}
        return {name for name, _ in self.whole.named_parameters()} - here


def build(recipe: Recipe, device: torch.device, checkpoint: Path | None = None) -> Built:
    """The model of a resolved recipe, with the weights of `checkpoint` where it holds whole ones.

    Adapters are not loaded here: the optimizer's state holds them exactly. From here on torch's global
    generators are seeded; they only serve dropout.
    """
    train, adapt = recipe.train, recipe.adapt
    model = _weights(recipe, device, checkpoint)
    adapted: list[str] = []
    if adapt.method != "full":
        shared = adapt.model_dump(include={field.name for field in fields(AdapterConfig)})
        config = AdapterConfig(**shared | {"alpha": adapt.alpha or 2.0 * adapt.rank})
        adapted = apply_adapter(model, config, seed=recipe.seed)
    elif adapt.freeze:
        freeze(model, adapt.freeze)
    apart = recipe.parallel.pipeline > 1 or recipe.parallel.expert > 1
    whole = without_values(model) if apart else model
    torch.manual_seed(recipe.seed)
    model.train()
    if train.precision == "float8":
        use_float8(model)
    sparing = train.compile and train.checkpointing == "selective"  # the compiler does it, inside its graph
    save_activations(
        model,
        "none" if sparing else train.checkpointing,
        every=train.checkpointing_every,
        budget=train.checkpointing_budget,
        offload=train.activation_offload,
        randomness=adapt.dropout > 0,
    )
    if train.compile:
        compile_blocks(model, graphs=train.cuda_graphs, sparing=sparing)
    source = recipe.model.source if recipe.model.source is not None else "from scratch"
    return Built(
        model,
        whole,
        _fitting(load_run_tokenizer(recipe), recipe, model),
        tuple(adapted),
        source,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        recipe.model.revision,
    )


def config_of(recipe: Recipe) -> ModelConfig:
    """The sizes of a resolved recipe's model; no weights are read."""
    if recipe.model.config is not None:
        return config_from_fields(recipe.model.config)
    assert recipe.model.source is not None  # the recipe's own check
    return read_config(resolve_source(recipe.model.source, recipe.model.revision))


def _weights(recipe: Recipe, device: torch.device, checkpoint: Path | None) -> Transformer:
    dtype, source, revision = DTYPES[recipe.train.precision], recipe.model.source, recipe.model.revision
    if recipe.adapt.method in ("full", "bitfit") and checkpoint is not None:  # it holds the whole model
        source, revision = str(checkpoint), None
    if source is None:
        assert recipe.model.config is not None
        return from_config(recipe.model.config, seed=recipe.seed).to(device=device, dtype=dtype)
    return load_model(source, dtype, device, revision, recipe.adapt.quantize)


def load_run_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a resolved recipe."""
    origin = recipe.model.tokenizer or recipe.model.source
    assert origin is not None  # the recipe's own check
    return load_tokenizer(origin, recipe.model.revision, recipe.data.chat_template)


def _fitting(tokenizer: Any, recipe: Recipe, model: Transformer) -> Any:
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"model.tokenizer: {recipe.model.tokenizer} has {len(tokenizer):,} tokens, but the model has "
            f"room for {model.config.vocab_size:,}; take the model's own tokenizer or a larger vocab_size"
        )
    return tokenizer
