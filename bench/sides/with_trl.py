"""TRL's side: SFTTrainer with PEFT, or without. With settings["unsloth"] on Unsloth's model (needs a GPU).

Conversations are given as prompt and completion, which is how TRL's documentation has the loss on the
answer only; plain texts as they are. TRL tokenizes.
"""

import json
from pathlib import Path
from typing import Any

from common import read_job, report

JOB = read_job()
if JOB["settings"].get("unsloth"):
    import unsloth  # noqa: F401  (it wants to be imported before transformers)

import torch  # noqa: E402
from callbacks import Counting, StepClock, arguments_of  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def dataset(path: str) -> Dataset:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if "messages" not in rows[0]:
        return Dataset.from_list(rows)
    return Dataset.from_list(
        [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    )


def model_and_adapter(job: dict[str, Any]) -> tuple[Any, Any]:
    """What SFTTrainer is to be given: a path and PEFT's config, or Unsloth's model with its adapters in."""
    settings = job["settings"]
    adapter = {"r": job["rank"], "lora_alpha": job["alpha"], "target_modules": job["targets"]}
    if settings.get("unsloth"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            job["model"],
            max_seq_length=job["sequence_length"],
            dtype=torch.bfloat16,
            load_in_4bit=bool(settings.get("nf4")),
            full_finetuning=not job["rank"],
        )
        if job["rank"]:
            names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
            options = adapter | {"target_modules": names, "use_gradient_checkpointing": "unsloth"}
            model = FastLanguageModel.get_peft_model(model, **options)
        return model, None
    if not settings.get("nf4"):
        return job["model"], LoraConfig(**adapter, task_type="CAUSAL_LM") if job["rank"] else None
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=quantized, dtype=torch.bfloat16
    )
    return model, LoraConfig(**adapter, task_type="CAUSAL_LM")


def main() -> None:
    job = JOB
    model, adapter = model_and_adapter(job)
    arguments = SFTConfig(max_length=job["sequence_length"], **arguments_of(job))
    clock = StepClock(job["device"])
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset(job["data"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=adapter,
        callbacks=[clock],
    )
    trainer.data_collator = counting = Counting(trainer.data_collator)
    trainer.train()
    chosen = ("bf16", "gradient_checkpointing", "packing", "per_device_train_batch_size")
    report(
        job,
        ("trl", "peft", "transformers", "accelerate", "bitsandbytes", "liger-kernel", "unsloth"),
        **clock.steps(counting, arguments),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        dtype=str(next(trainer.model.parameters()).dtype),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        settings=job["settings"] | {name: getattr(arguments, name) for name in chosen},
    )


if __name__ == "__main__":
    main()
