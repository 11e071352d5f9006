"""What is minimized: next-token cross-entropy, through the one loss core."""

import torch
from torch import Tensor

from ropewalk.data import Batch
from ropewalk.model import Transformer
from ropewalk.ops import linear_cross_entropy


def loss_sum(model: Transformer, batch: Batch, chunk: int) -> Tensor:
    """Cross-entropy summed over the scored tokens of a batch on the host: 0-d float32.

    Segments and labels stay on the host, where documents and scored tokens are counted, once for all layers,
    without waiting for the device.
    """
    device = model.output_weight.device
    tokens, positions, labels = batch.tokens, batch.positions, batch.labels
    if model.row_part is not None:  # other processes have the other tokens
        here = model.row_part.columns(tokens.shape[1])
        tokens, positions, labels = tokens[:, here], positions[:, here], labels[:, here]
    tokens, positions = (part.to(device, non_blocking=True) for part in (tokens, positions))
    hidden = model(tokens, positions=positions, segments=batch.segments)
    if model.blocks_part is not None and not model.blocks_part.head:
        return torch.zeros((), device=device)  # another process has it
    return head_loss_sum(model, hidden, labels, chunk)


def head_loss_sum(model: Transformer, hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """The same from hidden states `[B, S, H]` after all blocks, and labels `[B, S]`."""
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.output_weight,
        labels.flatten(),
        bias=model.output_bias,
        softcap=model.config.final_logit_softcapping,
        chunk=chunk,
        part=model.vocabulary,
    )


def without_padding(batch: Batch, unit: int = 64) -> Batch:
    """The batch less the columns that are padding in every row, to a multiple of `unit` columns."""
    used = (batch.segments >= 0).any(0).nonzero()
    width = min(batch.tokens.shape[1], -(-(int(used[-1]) + 1) // unit) * unit) if len(used) else 0
    if width == batch.tokens.shape[1]:
        return batch
    parts = (batch.tokens, batch.labels, batch.positions, batch.segments)
    tokens, labels, positions, segments = (part[:, :width] for part in parts)
    return Batch(tokens, labels, positions, segments, batch.documents)
