"""Virtual tokens: learned, never read from a text, before every document."""

import torch
from torch import Tensor, nn

from ropewalk.model.config import ModelConfig

KeyValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[tokens, kv_heads, head_dim]`."""


class VirtualTokens(nn.Module):
    """`embedding` has a row for each token.

    A row is the token's embedding, which runs through the blocks as any other (prompt tuning, arXiv
    2104.08691); or with `per_layer` its key and value in each layer, one after the other (prefix tuning,
    arXiv 2101.00190). No document changes what virtual tokens are: both come down to keys and values.
    """

    def __init__(self, config: ModelConfig, rows: Tensor, per_layer: bool) -> None:
        super().__init__()
        self.per_layer = per_layer
        self._shape = (len(rows), config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        self.embedding = nn.Embedding.from_pretrained(rows, freeze=False)

    @staticmethod
    def width(config: ModelConfig, per_layer: bool) -> int:
        """Numbers in a row."""
        values = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        return values if per_layer else config.hidden_size

    @property
    def count(self) -> int:
        return self._shape[0]

    def key_values(self) -> list[KeyValues]:
        """Those of each layer, where they are what is learned."""
        assert self.per_layer
        layers = self.embedding.weight.view(self._shape).unbind(1)
        return [(k, v) for k, v in (layer.unbind(1) for layer in layers)]

    def positions(self) -> Tensor:
        """`[1, count]`: they come first."""
        return torch.arange(self.count, device=self.embedding.weight.device)[None]
