"""torchtune's side: its single-device recipes, full and LoRA, on examples padded to the longest of a batch.

The recipes are torchtune's own; only the data loader is written here, which tells the time whenever a batch
is asked for, and nothing is saved at the end. It runs on the older torch that it needs (see environments.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torchtune
from common import Clock, examples, read_job, report
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchtune.data import padded_collate_sft

RECIPES = Path(torchtune.__file__).parent.parent / "recipes"  # files to be run, not a package


class OnRows:
    """Put before a recipe's class: trains on the job's rows, keeps time, and saves nothing."""

    def _setup_data(self, *arguments: Any, **options: Any) -> DataLoader:
        sampler = DistributedSampler(self.rows, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(
            self.rows, self.rows_a_batch, sampler=sampler, collate_fn=self._collate, drop_last=True
        )

    def _collate(self, rows: list[Any]) -> Any:
        self.clock.tick()
        self.tokens.append(sum(len(row["tokens"]) for row in rows))
        self.scored.append(sum(label != -100 for row in rows for label in row["labels"]))
        return padded_collate_sft(rows, padding_idx=0, ignore_idx=-100)

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        pass


def model_of(job: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The model's part of a recipe's configuration."""
    family = "llama3_2" if shape["tie_word_embeddings"] else "llama3"
    model = {
        "_component_": f"torchtune.models.{family}.{'lora_' if job['rank'] else ''}{family}",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "max_seq_len": job["sequence_length"],
        "intermediate_dim": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": int(shape["rope_theta"]),
    }
    if job["rank"]:
        model |= {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
        }
        model |= {"lora_rank": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.0}
    return model


def configuration(job: dict[str, Any], shape: dict[str, Any]) -> Any:
    """What torchtune reads from a YAML file: its published single-device recipes, with the job's sizes."""
    files = sorted(path.name for path in Path(job["model"]).glob("*.safetensors"))
    values = {
        "device": job["device"],
        "dtype": "bf16",
        "seed": job["seed"],
        "output_dir": job["output"],
        "epochs": 1,
        "max_steps_per_epoch": job["steps"] + 1,
        "batch_size": job["micro_batch_size"],
        "gradient_accumulation_steps": job["batch_size"] // job["micro_batch_size"],
        "shuffle": False,
        "resume_from_checkpoint": False,
        "optimizer_in_bwd": False,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "compile": job["settings"]["compile"],
        "log_every_n_steps": 1,
        "model": model_of(job, shape),
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0},
        "dataset": {},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job["model"],
            "checkpoint_files": files,
            "output_dir": job["output"],
            "model_type": "LLAMA3_2" if shape["tie_word_embeddings"] else "LLAMA3",
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": job["learning_rate"]},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": job["output"],
        },
    }
    return OmegaConf.create(values)


def main() -> None:
    job = read_job()
    shape = json.loads(Path(job["model"], "config.json").read_text())
    sys.path.insert(0, str(RECIPES))
    if job["rank"]:
        from lora_finetune_single_device import LoRAFinetuneRecipeSingleDevice as Recipe
    else:
        from full_finetune_single_device import FullFinetuneRecipeSingleDevice as Recipe
    config = configuration(job, shape)
    recipe = type("OnRowsRecipe", (OnRows, Recipe), {})(config)
    rows, micro = examples(job["examples"]), config.gradient_accumulation_steps
    wanted = (job["steps"] + 1) * job["batch_size"]
    recipe.rows = (rows * -(-wanted // len(rows)))[:wanted]
    recipe.rows_a_batch = job["micro_batch_size"]
    recipe.clock, recipe.tokens, recipe.scored = Clock(job["device"]), [], []
    recipe.setup(cfg=config)
    recipe.train()
    # The end of a step is seen when the next asks for its batch: one more was done than is counted.
    steps = range(0, job["steps"] * micro, micro)
    report(
        job,
        ("torchtune", "torchao"),
        seconds=[sum(recipe.clock.seconds[i : i + micro]) for i in steps],
        tokens=[sum(recipe.tokens[i : i + micro]) for i in steps],
        scored_tokens=[sum(recipe.scored[i : i + micro]) for i in steps],
        losses=[],
        trainable=sum(p.numel() for p in recipe._model.parameters() if p.requires_grad),
        settings=job["settings"] | {"threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
