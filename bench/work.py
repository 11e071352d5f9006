"""The work that all sides of a benchmark are given: a model directory and the same tokens for everyone.

    model/          config.json, weights, tokenizer: what `from_pretrained` and Ropewalk's `model.source` read
    train.jsonl     the documents as text or conversations, for sides that tokenize
    examples.jsonl  the documents as token ids and labels, for sides that take tokens
    stream.npy      the documents one after the other, for sides that cut rows out of a stream

Synthetic documents are rows of random words for a tokenizer whose word "17" is token 17: so they go through
every tool's own data path, and it is known which tokens come out.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = {"<pad>": 0, "<begin>": 1, "<end>": 2}
SHARD_BYTES = 2_000_000_000


def synthetic_documents(
    folder: Path, vocabulary: int, count: int, length: int, seed: int, median: int | None = None
) -> None:
    """Writes `count` texts that are `length` tokens each with the end token that tools put after a text.

    With `median`, as many tokens in texts of log-normal lengths around it (deviation 0.5), at most `length`.
    """
    generator = np.random.default_rng(seed)
    lengths = np.full(count, length)
    if median is not None:
        drawn = np.exp(generator.normal(np.log(median), 0.5, 4 * count * length // median))
        drawn = drawn.round().clip(8, length).astype(int)
        lengths = drawn[: int(np.searchsorted(np.cumsum(drawn), count * length)) + 1]
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for size in lengths.tolist():
            row = generator.integers(len(SPECIAL), vocabulary, size - 1).tolist()
            file.write(json.dumps({"text": " ".join(map(str, row))}) + "\n")


def synthetic_conversations(
    folder: Path,
    vocabulary: int,
    count: int,
    seed: int,
    *,
    median: int,
    spread: float,
    least: int,
    most: int,
    scored: float,
) -> None:
    """`count` prompts with completions: log-normal lengths with the end token, the last share `scored`."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(median), spread, count)).round().clip(least, most).astype(int)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for length in lengths.tolist():
            words = list(map(str, generator.integers(len(SPECIAL), vocabulary, length - 1)))
            cut = length - max(2, round(scored * length))
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
            file.write(json.dumps(row) + "\n")


def conversations(folder: Path, source: Path, count: int, seed: int) -> None:
    """`count` conversations of a JSONL file, chosen by seed."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = random.Random(seed).sample(lines, min(count, len(lines)))
    (folder / "train.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def write_tokens(folder: Path, recipe: Mapping[str, Any]) -> dict[str, int]:
    """examples.jsonl and stream.npy as Ropewalk tokenizes the recipe's data; their numbers of tokens."""
    from ropewalk.data import prepare

    shards = prepare(recipe).train
    stream: list[np.ndarray] = []
    with open(folder / "examples.jsonl", "w", encoding="utf-8") as file:
        for i in range(len(shards)):
            document = shards.document(i)
            labels = np.where(document.scored, document.tokens.astype(np.int64), -100)
            file.write(json.dumps({"tokens": document.tokens.tolist(), "labels": labels.tolist()}) + "\n")
            stream.append(document.tokens)
    np.save(folder / "stream.npy", np.concatenate(stream))
    return {"documents": len(shards), "tokens": shards.tokens, "scored_tokens": shards.scored}


def write_model(folder: Path, config: Mapping[str, Any], weights: bool, seed: int) -> None:
    """A Hugging Face directory of the shape: random bfloat16 weights (or none), the tokenizer of numbers."""
    if (folder / "complete").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, config["vocab_size"])
    content = dict(config) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if weights:
        _write_weights(folder, content, seed)
    (folder / "complete").touch()


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL | {str(i): i for i in range(len(SPECIAL), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, unk_token=pad
    ).save_pretrained(folder)


def _write_weights(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """Normal weights of deviation initializer_range and norms of one, a few GB at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}  # a tied head is there once
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * shape.numel() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
        total += 2 * shape.numel()
    # Drawn once and repeated: billions of normal numbers would take longer than what is measured.
    drawn = torch.empty(1 << 22).normal_(generator=torch.Generator().manual_seed(seed)).bfloat16()
    drawn *= config["initializer_range"]
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        of = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{of}.safetensors"
        tensors = {
            name: drawn.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape).clone()
            if len(shape := shapes[name]) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
