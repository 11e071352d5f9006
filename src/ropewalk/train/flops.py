"""Model FLOPs of a training step, and the share of the hardware's peak that they make.

Convention: a multiply-add is 2 FLOPs. Only matrix products count, and only those that the mathematics asks
for (recomputed activations do not: this is model, not hardware, utilization, arXiv 2204.02311 appendix B):

- a weight costs 2 per token forward, 2 for its input's gradient and, if it is trained, 2 for its own. A
  frozen weight under LoRA so costs 4, an adapter's 6. (The input gradient of the very first frozen layer,
  which nobody needs, is counted: below 1 %.)
- the output head meets scored tokens only; the embedding lookup is free; a mixture of experts counts the
  experts that a token is sent to.
- attention costs 4 x heads x head_dim for each (query, key) pair that is really attended: causal, inside a
  document, inside the window; twice that backward. Padding counts nowhere.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ropewalk.data.batch import Batch
from ropewalk.errors import UserError
from ropewalk.model.config import ModelConfig
from ropewalk.parallel import World, spans


@dataclass(frozen=True)
class TokenCounts:
    """What one batch holds. `pairs` maps each attention window (None: unlimited) to its attended pairs."""

    tokens: int
    scored: int
    slots: int
    pairs: dict[int | None, int]

    @classmethod
    def of(cls, batch: Batch, config: ModelConfig) -> "TokenCounts":
        real = batch.segments >= 0
        seen = batch.positions[real] + 1  # a query at position p attends the p + 1 keys up to itself
        windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        return cls(
            tokens=int(real.sum()),
            scored=int((batch.labels != -100).sum()),
            slots=real.numel(),
            pairs={w: int((seen if w is None else seen.clamp(max=w)).sum()) for w in windows},
        )

    def total(self, world: World) -> "TokenCounts":
        """The sums over all processes."""
        windows = list(self.pairs)
        tokens, scored, slots, *pairs = map(
            int, world.total([self.tokens, self.scored, self.slots, *self.pairs.values()])
        )
        return TokenCounts(tokens, scored, slots, dict(zip(windows, pairs, strict=True)))


def block_parameters(config: ModelConfig, layer: int) -> int:
    """Weights of one block that a token is multiplied with."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    matrices = 3 if config.mlp_gated else 2
    if layer in config.moe_layers:
        experts = config.num_experts_per_tok * matrices * config.moe_intermediate_size + config.num_experts
        return attention + config.hidden_size * experts
    return attention + matrices * config.hidden_size * config.intermediate_size


@lru_cache(maxsize=256)
def stages_of(config: ModelConfig, count: int) -> tuple[range, ...]:
    """The blocks of each of `count` stages of a pipeline: as even as they can be made by the weights that a
    token is multiplied with, those of the head included. (Looking up an embedding is free.)"""
    costs = [float(block_parameters(config, layer)) for layer in range(config.num_hidden_layers)]
    return tuple(spans(costs, float(config.vocab_size * config.hidden_size), count))


def step_flops(config: ModelConfig, counts: TokenCounts, adapter_parameters: int | None = None) -> int:
    """FLOPs of forward and backward over a batch; `adapter_parameters`: None where all weights train."""
    per_weight = 6 if adapter_parameters is None else 4
    layers = range(config.num_hidden_layers)
    blocks = per_weight * sum(block_parameters(config, layer) for layer in layers) * counts.tokens
    adapters = 6 * (adapter_parameters or 0) * counts.tokens
    head = per_weight * config.vocab_size * config.hidden_size * counts.scored
    pairs = sum(counts.pairs[config.window(layer)] for layer in layers)
    attention = 3 * 4 * config.num_attention_heads * config.head_dim * pairs
    return blocks + adapters + head + attention


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device in bfloat16; None where it is not known (every CPU, other types)."""
    if dtype != torch.bfloat16:
        return None
    from ropewalk.plan.hardware import accelerator  # deferred: the planner knows the training step

    try:
        return accelerator(device_name).peak.get("bfloat16")
    except UserError:
        return None
