"""What the sides on transformers' Trainer (TRL's is one) share: its arguments, a clock and a counter."""

from typing import Any

from common import Clock
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: data, computation, logging."""

    def __init__(self, device: str) -> None:
        self.clock = Clock(device)

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.clock.tick()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.clock.tick()

    def steps(self, counting: "Counting", arguments: Any) -> dict[str, list[Any]]:
        """Seconds, tokens and scored tokens of each step."""
        seconds, each = self.clock.seconds, arguments.gradient_accumulation_steps
        at = [slice(i * each, (i + 1) * each) for i in range(len(seconds))]
        return {
            "seconds": seconds,
            "tokens": [sum(counting.tokens[part]) for part in at],
            "scored_tokens": [sum(counting.scored[part]) for part in at],
        }


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


def arguments_of(job: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments of the job: one epoch, or its steps, with nothing done beside training."""
    length = {"max_steps": job["steps"]} if job["steps"] else {"num_train_epochs": 1}
    return {
        "output_dir": job["output"],
        "learning_rate": job["learning_rate"],
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
        **length,
        **job["settings"]["arguments"],
    }
