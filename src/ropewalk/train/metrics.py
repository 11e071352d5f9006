"""The numbers of a step: what was done, how fast, and with how much memory."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ropewalk.model.config import ModelConfig
from ropewalk.train.flops import TokenCounts, peak_flops, step_flops


@dataclass
class Meter:
    """Turns a step's measurements into its record. The totals go into checkpoints and come back on resume."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    adapter_parameters: int | None
    """Trained parameters of a LoRA run; None where every weight is trained."""
    tokens_seen: int = 0
    """padding excluded"""
    scored_seen: int = 0
    train_seconds: float = 0.0
    """time in training steps: without evaluation, samples and checkpoints"""
    _peak: float | None = field(init=False)

    def __post_init__(self) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        self._peak = peak_flops(name, self.dtype)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run so far; evaluation and checkpoints excluded."""
        return self.tokens_seen / self.train_seconds if self.train_seconds else 0.0

    def peak_memory(self) -> int:
        """Most bytes held at once so far: allocated on the GPU, or resident in this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def totals(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens_seen,
            "scored_seen": self.scored_seen,
            "train_seconds": self.train_seconds,
        }

    def record(
        self, step: int, counts: TokenCounts, seconds: float, data_wait: float, values: dict[str, float]
    ) -> dict[str, Any]:
        """The record of a step that took `seconds`, of which `data_wait` were spent waiting for its batch."""
        self.tokens_seen += counts.tokens
        self.scored_seen += counts.scored
        self.train_seconds += seconds
        flops = step_flops(self.config, counts, self.adapter_parameters) / seconds
        record = {
            "kind": "train",
            "step": step,
            **values,
            "tokens": counts.tokens,
            "scored_tokens": counts.scored,
            "padding": round(1.0 - counts.tokens / counts.slots, 4),
            "tokens_seen": self.tokens_seen,
            "scored_tokens_seen": self.scored_seen,
            "tokens_per_second": round(counts.tokens / seconds, 2),
            "scored_tokens_per_second": round(counts.scored / seconds, 2),
            "flops_per_second": round(flops),
            "seconds": round(seconds, 6),
            "data_wait_seconds": round(data_wait, 6),
            "train_seconds": round(self.train_seconds, 3),
            "peak_memory_bytes": self.peak_memory(),
            "time": round(time.time(), 3),
        }
        if self._peak is not None:
            record["mfu"] = round(flops / self._peak, 4)
        return record
