"""The side of transformers' Trainer: full fine-tuning, or PEFT's LoRA, on examples padded to the longest.

With settings["liger"] the Trainer puts Liger-Kernel's Triton kernels in (a GPU is needed). The job's tokens
are given as they are, so that every tool scores the same ones.
"""

from typing import Any

import torch
from callbacks import Counting, StepClock, arguments_of
from common import examples, read_job, report
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    job = read_job()
    settings = job["settings"]
    dtype = getattr(torch, settings["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    if job["rank"]:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapter)
        if settings["arguments"].get("gradient_checkpointing"):
            model.enable_input_require_grads()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    clock = StepClock(job["device"])
    arguments = TrainingArguments(**arguments_of(job))
    counting = Counting(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[
            {"input_ids": row["tokens"], "attention_mask": [1] * len(row["tokens"]), "labels": row["labels"]}
            for row in examples(job["examples"])
        ],
        data_collator=counting,
        callbacks=[clock],
    )
    trainer.train()
    report(
        job,
        ("transformers", "accelerate", "peft", "liger-kernel"),
        **clock.steps(counting, arguments),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        settings=settings,
    )


if __name__ == "__main__":
    main()
