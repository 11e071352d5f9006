"""A model from scratch: its config and its first weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.model.families_config import config_from_hf
from ropewalk.model.layers import RMSNorm
from ropewalk.model.transformer import Transformer


def from_config(
    config: Mapping[str, Any] | str | Path | ModelConfig, seed: int, device: str | torch.device = "cpu"
) -> Transformer:
    """A float32 model with random weights that depend on config, seed and kind of device only.

    `config` holds Hugging Face config fields (`model_type` and the sizes at least), or is the path of a
    JSON or YAML file with them. Raises UserError naming file and field.
    """
    with torch.device("meta"):
        model = Transformer(config if isinstance(config, ModelConfig) else config_from_fields(config))
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def config_from_fields(config: Mapping[str, Any] | str | Path) -> ModelConfig:
    """What `from_config` makes of Hugging Face fields, or of the path of a JSON or YAML file with them."""
    if isinstance(config, str | Path):
        return config_from_hf(_read(Path(config)), str(config))
    return config_from_hf(config, "model.config")


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Normal weights of deviation initializer_range, zero biases, norms that do nothing.

    Those of what writes into the residual stream (o_proj, down_proj) are divided by sqrt(2 * layers), so that
    depth does not make it grow (GPT-2).
    """
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    deviation = model.config.initializer_range
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and module is not model.head):
            shrink = math.sqrt(2 * len(model.blocks)) if name.endswith(("o_proj", "down_proj")) else 1.0
            module.weight.normal_(0.0, deviation / shrink, generator=generator)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(0.0 if module.plus_one else 1.0)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.zero_()
    if not model.config.tie_word_embeddings:
        model.head.weight.normal_(0.0, deviation, generator=generator)


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: neither valid JSON nor YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: not a mapping of config fields")
    return raw
