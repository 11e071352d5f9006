"""TRL's side: SFTTrainer with PEFT on the same data. Argument: a JSON file with the job.

Runs in TRL's own environment, where nothing of Ropewalk is. The conversations are given as prompt and
completion, which is how TRL's documentation has the loss on the answer only.
"""

import importlib.metadata
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next: computation, data, logging, all of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.perf_counter())


class Counting:
    """A data collator that counts what goes through it: real tokens, and those with a label."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.tokens, self.scored = collator, [], []

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        mask = batch.get("attention_mask")
        self.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        self.scored.append(int((batch["labels"] != -100).sum()))
        return batch


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line)["messages"] for line in Path(job["data"]).read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    arguments = SFTConfig(
        output_dir=job["output"],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        max_length=job["sequence_length"],
        seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **job["config"],
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=job["model"],
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"], task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.data_collator = counting = Counting(trainer.data_collator)
    trainer.train()
    names = ("trl", "peft", "transformers", "accelerate", "torch")
    steps = len(clock.ends) - 1
    values = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "seconds": [after - before for before, after in pairwise(clock.ends)],
        "tokens": counting.tokens[:steps],
        "scored_tokens": counting.scored[:steps],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "dtype": str(next(trainer.model.parameters()).dtype),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "settings": {
            name: getattr(arguments, name)
            for name in ("bf16", "gradient_checkpointing", "packing", "per_device_train_batch_size")
        },
        "threads": torch.get_num_threads(),
    }
    print("RESULT " + json.dumps(values))


if __name__ == "__main__":
    main()
