"""LitGPT's side: its own `pretrain`, `finetune_full` and `finetune_lora` on the job's tokens.

The loops are LitGPT's, unchanged; only its data module is written here, and tells the time whenever a batch
is asked for. Weights are random, since their values cost nothing; fine-tuning reads them from a checkpoint
as LitGPT always does.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Clock, examples, read_job, report
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.prompts import Default
from litgpt.utils import save_config
from torch.utils.data import DataLoader


class Rows(DataModule):
    """Batches of the job's documents; their numbers of tokens, and when each was asked for."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.clock, self.tokens, self.scored = Clock(job["device"]), [], []
        self.pretraining = job["settings"]["method"] == "pretrain"
        self.prompt_style = Default()
        self.data = [
            {
                "input_ids": torch.tensor(row["tokens"]),
                "labels": torch.tensor(row["labels"]),
                "token_counts": dict.fromkeys(("raw", "raw_plus_prompt_template"), len(row["tokens"])),
            }
            for row in examples(job["examples"])
        ]
        if self.pretraining:  # rows of one token more than the model sees, as LitGPT's own streams are cut
            length = job["sequence_length"] + 1
            stream = torch.cat([row["input_ids"] for row in self.data])
            self.data = list(stream[: len(stream) // length * length].view(-1, length))

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return self._loader(self._collate)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._together)

    def _loader(self, collate: Any) -> DataLoader:
        return DataLoader(self.data, self.batch_size, drop_last=True, collate_fn=collate)

    def _together(self, rows: list[Any]) -> Any:
        return torch.stack(rows) if self.pretraining else get_sft_collate_fn()(rows)

    def _collate(self, rows: list[Any]) -> Any:
        self.clock.tick()
        counted = rows if not self.pretraining else [{"labels": row[1:]} for row in rows]
        self.tokens.append(sum(len(row["labels"]) for row in counted))
        self.scored.append(sum(int((row["labels"] != -100).sum()) for row in counted))
        return self._together(rows)


def config_of(job: dict[str, Any]) -> Config:
    """LitGPT's config of the job's shape."""
    shape = json.loads(Path(job["model"], "config.json").read_text())
    return Config(
        name="benchmark",
        block_size=max(job["sequence_length"], 2),
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        head_size=shape["head_dim"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rope_base=int(shape["rope_theta"]),
    )


def write_checkpoint(job: dict[str, Any]) -> None:
    """A checkpoint directory with random bfloat16 weights, and the tokenizer that LitGPT insists on."""
    from litgpt.model import GPT

    folder = Path(job["output"], "checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(job)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    drawn = torch.empty(1 << 22).normal_(std=0.02).bfloat16()  # repeated, as in work.py
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else drawn.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / "lit_model.pth")
    save_config(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(job["model"], name), folder)


def main() -> None:
    job = read_job()
    settings, out = job["settings"], Path(job["output"])
    if sys.argv[2:] == ["checkpoint"]:
        return write_checkpoint(job)
    data = Rows(job)
    # The end of a step is seen when the next asks for its batch: one more is done than is counted.
    arguments = {"precision": settings["precision"], "devices": 1, "data": data, "out_dir": out}
    arguments |= {"seed": job["seed"], "logger_name": "csv"}
    train = {
        "save_interval": None,
        "log_interval": 1,
        "global_batch_size": job["batch_size"],
        "micro_batch_size": job["micro_batch_size"],
        "lr_warmup_steps": 1,
    }
    micro = job["batch_size"] // job["micro_batch_size"]
    if data.pretraining:
        from litgpt import pretrain

        tokens = job["steps"] * job["batch_size"] * job["sequence_length"]
        train |= {"max_tokens": tokens, "max_norm": 1.0, "max_seq_length": job["sequence_length"]}
        train |= {"tie_embeddings": config_tied(job)}
        evaluation = EvalArgs(interval=10**9, max_iters=1, final_validation=False)
        pretrain.setup("benchmark", config_of(job), train=TrainArgs(**train), eval=evaluation, **arguments)
    else:
        from litgpt.finetune import full, lora

        subprocess.run([sys.executable, __file__, sys.argv[1], "checkpoint"], check=True)
        train |= {"epochs": 1000, "max_steps": job["steps"] + 1}
        evaluation = EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False)
        arguments |= {"checkpoint_dir": out / "checkpoint", "eval": evaluation, "train": TrainArgs(**train)}
        if settings["method"] == "lora":
            # Its merge, after the training, reads what it merges from the command line, and there is none.
            lora.merge_lora = lambda **options: None
            every = ("query", "key", "value", "projection", "mlp")
            adapters = {f"lora_{name}": True for name in every} | {"lora_dropout": 0.0}
            lora.setup(**arguments, **adapters, lora_r=job["rank"], lora_alpha=int(job["alpha"]))
        else:
            full.setup(**arguments)
    steps = range(0, job["steps"] * micro, micro)
    report(
        job,
        ("litgpt", "lightning"),
        seconds=[sum(data.clock.seconds[i : i + micro]) for i in steps],
        tokens=[sum(data.tokens[i : i + micro]) for i in steps],
        scored_tokens=[sum(data.scored[i : i + micro]) for i in steps],
        losses=[],
        trainable=None,
        settings=settings,
    )


def config_tied(job: dict[str, Any]) -> bool:
    return bool(json.loads(Path(job["model"], "config.json").read_text())["tie_word_embeddings"])


if __name__ == "__main__":
    main()
