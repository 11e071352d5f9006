"""flops: counted by hand for small shapes, with the conventions of the module's docstring."""

import pytest
import torch

from ropewalk.data.batch import Batch
from ropewalk.model.config import ModelConfig
from ropewalk.train.flops import TokenCounts, peak_flops, step_flops

SHAPE = {
    "family": "llama",
    "vocab_size": 100,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def batch_of(rows: list[list[int]], width: int) -> Batch:
    """A batch whose rows hold documents of the given lengths; every second token is scored."""
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    segments = torch.full_like(positions, -1)
    labels = torch.full_like(positions, -100)
    for r, lengths in enumerate(rows):
        start = 0
        for s, length in enumerate(lengths):
            positions[r, start : start + length] = torch.arange(length)
            segments[r, start : start + length] = s
            labels[r, start : start + length : 2] = 1
            start += length
    return Batch(torch.zeros_like(positions), labels, positions, segments)


def test_counts_are_those_of_a_mask_drawn_out() -> None:
    config = ModelConfig(**SHAPE, layer_types=("full_attention", "sliding_attention"), sliding_window=3)
    batch = batch_of([[5, 4], [7]], 10)
    counts = TokenCounts.of(batch, config)
    assert (counts.tokens, counts.scored, counts.slots) == (16, 3 + 2 + 4, 20)
    for window, pairs in counts.pairs.items():
        drawn = 0
        for row in range(2):
            for q in range(10):
                for k in range(q + 1):
                    same = batch.segments[row, q] == batch.segments[row, k] >= 0
                    drawn += bool(same) and (window is None or q - k < window)
        assert pairs == drawn
    assert set(counts.pairs) == {None, 3}


def test_full_training_costs_six_per_weight_and_token() -> None:
    config = ModelConfig(**SHAPE)
    counts = TokenCounts(tokens=10, scored=4, slots=16, pairs={None: 30})
    block = 12 * (24 + 8 + 8 + 24) + 3 * 12 * 20
    expected = 6 * 2 * block * 10 + 6 * 100 * 12 * 4 + 3 * 2 * (2 * 2 * 3 * 8) * 30
    assert step_flops(config, counts) == expected


def test_a_frozen_base_costs_four_and_its_adapters_six() -> None:
    config = ModelConfig(**SHAPE)
    counts = TokenCounts(tokens=10, scored=0, slots=16, pairs={None: 0})
    assert (
        step_flops(config, counts, adapter_parameters=50) == step_flops(config, counts) * 4 // 6 + 6 * 50 * 10
    )


def test_a_mixture_counts_the_experts_that_a_token_meets() -> None:
    dense = ModelConfig(**SHAPE)
    mixture = ModelConfig(
        **SHAPE, moe_layers=(1,), num_experts=8, num_experts_per_tok=2, moe_intermediate_size=20
    )
    counts = TokenCounts(tokens=1, scored=0, slots=1, pairs={None: 0})
    extra = 6 * (3 * 12 * 20 + 12 * 8)  # a second expert and the router
    assert step_flops(mixture, counts) - step_flops(dense, counts) == extra


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("", torch.bfloat16, None),
    ],
)
def test_peaks_are_given_only_where_known(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak
