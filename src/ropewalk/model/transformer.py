"""The one decoder-only transformer: every family is this module with another ModelConfig."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from ropewalk.errors import UserError
from ropewalk.model.cache import KVCache
from ropewalk.model.config import ModelConfig
from ropewalk.model.layers import MLP, Attention, Context, Tables, make_norm
from ropewalk.model.moe import MixtureOfExperts, RouterStatistics, load_balancing_loss
from ropewalk.model.virtual import VirtualTokens
from ropewalk.ops.attention import AttentionLayout, attention
from ropewalk.ops.attention_parts import RowPart
from ropewalk.ops.embedding import Embedding
from ropewalk.ops.head import VocabularyPart
from ropewalk.ops.linear import Linear
from ropewalk.ops.rope import depends_on_length, effective_length, rope_frequencies, rope_tables


class Block(nn.Module):
    """Attention and MLP with their norms and residual connections."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        size = config.hidden_size
        self.parallel = config.parallel_residual
        self.attention_norm = make_norm(config, size) if before else None
        self.attention = Attention(config, layer)
        self.post_attention_norm = make_norm(config, size) if after else None
        self.mlp_norm = make_norm(config, size) if before else None
        moe = layer in config.moe_layers
        self.mlp = MixtureOfExperts(config) if moe else MLP(config, config.intermediate_size)
        self.post_mlp_norm = make_norm(config, size) if after else None
        self.tile: int | None = None
        """In training, rows of more than twice as many tokens go through the MLP by that many at a time."""
        self.recomputed = False
        """Whether the backward pass runs it once more: what it keeps till then is not here to decide."""

    def forward(self, hidden: Tensor, context: Context) -> tuple[Tensor, RouterStatistics | None]:
        """hidden `[B, S, hidden_size]` -> (the same shape, statistics of the router if there is one)."""
        out = self.attention(hidden if self.attention_norm is None else self.attention_norm(hidden), context)
        if self.post_attention_norm is not None:
            out = self.post_attention_norm(out)
        residual = hidden + out
        source = hidden if self.parallel else residual
        x = source if self.mlp_norm is None else self.mlp_norm(source)
        statistics = None
        if isinstance(self.mlp, MixtureOfExperts):
            out, statistics = self.mlp(x, context.real)
        elif self.tile is not None and x.shape[1] > 2 * self.tile and torch.is_grad_enabled():
            out = _by_tiles(self.mlp, x, self.tile)
        else:
            out = self.mlp(x)
        if self.post_mlp_norm is not None:
            out = self.post_mlp_norm(out)
        return residual + out, statistics


@_disable_dynamo  # as many tiles as the row is long would be unrolled
def _by_tiles(mlp: nn.Module, x: Tensor, size: int) -> Tensor:
    """`mlp(x)` for x `[B, S, H]`, `size` tokens at a time (as arXiv 2506.13996): what it keeps inside is for
    one tile only. Each tile is computed again in the backward pass."""
    return torch.cat([checkpoint(mlp, part, use_reentrant=False) for part in x.split(size, 1)], 1)


RunBlock = Callable[[Any, Tensor, Context], tuple[Tensor, RouterStatistics | None]]


RunSpan = Callable[[range, Tensor | None], Tensor]
"""(blocks, hidden states that come to them; None: to the first) -> hidden states."""


@dataclass(frozen=True)
class BlocksPart:
    """Some blocks are here, and other processes have the others."""

    through: Callable[[RunSpan, tuple[int, ...]], Tensor]
    """Hidden states of tokens of a shape `[B, S]` after all blocks, without gradients; where the head is not
    here, some numbers of the same shape."""
    head: bool
    """whether the norm after the last block and the head are here"""
    shared: Callable[[Tensor], Tensor]
    """what the process with the head has in such a tensor"""


class Transformer(nn.Module):
    """`model.logits(model(tokens))`. It knows nothing of ranks and has no dropout.

    Built under `torch.device("meta")` it takes no memory. `run_block(block, hidden, context)`, where it is
    set, calls the blocks in training: the place for what saves activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.run_block: RunBlock | None = None
        self.vocabulary: VocabularyPart | None = None
        """What of the output head is here, where processes share it; None: all of it."""
        self.row_part: RowPart | None = None
        """What of packed rows is here, where processes share their tokens; None: all of it."""
        self.blocks_part: BlocksPart | None = None
        """What of the blocks is here, where processes share them; None: all of them."""
        self.embed = _embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = _embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()
        self._frequencies: dict[Any, tuple[Tensor, float]] = {}
        self.virtual_tokens: VirtualTokens | None = None
        self.router: tuple[list[RouterStatistics], int | Tensor] = ([], 0)
        """Of the last forward in training: statistics of its mixtures of experts, and its real tokens."""

    def tie_head(self) -> None:
        """Let head and embedding be one Parameter again, where the config says so."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Any, recurse: bool = True) -> "Transformer":
        super()._apply(fn, recurse)
        self.tie_head()  # to_empty() and other replacements of parameters untie it
        return self

    @property
    def context_length(self) -> int:
        """Tokens that a document may have: the model's positions, less those that virtual tokens take."""
        taken = 0 if self.virtual_tokens is None else self.virtual_tokens.count
        return self.config.max_position_embeddings - taken

    @property
    def output_weight(self) -> Tensor:
        """`[vocab_size, hidden_size]`: what turns hidden states into logits."""
        return self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """No family here has one."""
        return self.head.bias

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        span: range | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, `[B, S, hidden_size]`.

        tokens    `[B, S]` int64
        positions `[B, S]` int64, index in the document; by default from 0 in each row or segment, or on from
                  where the cache ends; -1 is padding (on the left, with a cache)
        segments  `[B, S]`, document of each token in a packed row, -1 in padding; no document sees another
                  (best on the host: its documents are counted there); with a `row_part`, `[B, S * degree]`:
                  of the whole rows, of which tokens and positions (to be given) are that part
        cache     appended to; not together with segments
        span      only these blocks, to which `hidden` comes (with the first one: the embeddings); the final
                  norm is with the last one
        """
        if cache is not None and segments is not None:
            raise ValueError("segments and a cache cannot be used together")
        if cache is not None and cache.length and self._outgrows(cache, tokens, positions):
            return self._again(tokens, positions, cache)
        context, positions = self._context(tokens, positions, segments, cache)
        reach = positions
        if segments is not None and self.row_part is not None:  # frequencies are those of the whole rows
            reach = torch.where(segments >= 0, _restarting(segments), 0)

        def run(span: range, hidden: Tensor | None) -> Tensor:
            return self._run(span, hidden, tokens, context, positions, reach)

        if span is None and self.blocks_part is not None:
            hidden = self.blocks_part.through(run, tuple(tokens.shape))
        else:
            hidden = run(range(self.config.num_hidden_layers) if span is None else span, hidden)
        if cache is not None:
            cache.length += tokens.shape[1]
        return hidden

    def _run(
        self,
        span: range,
        hidden: Tensor | None,
        tokens: Tensor,
        context: Context,
        positions: Tensor,
        reach: Tensor,
    ) -> Tensor:
        if hidden is None:
            hidden = self.embedded(tokens)
            if self.config.position == "learned":
                hidden = hidden + self.embed_positions(positions)
        self._turn(context, positions, reach, hidden.dtype)
        virtual, before = self._virtual(context, positions)
        statistics = []
        run = self.run_block if self.training and torch.is_grad_enabled() else None
        for index in span:
            block = self.blocks.get_submodule(str(index))
            if virtual is not None:  # leaves its keys and values to the documents, by way of the contexts
                virtual, _ = block(virtual, before)
            hidden, routed = block(hidden, context) if run is None else run(block, hidden, context)
            if routed is not None:
                statistics.append(routed)
        real = tokens.numel() if context.real is None else context.real.sum()
        self.router = (statistics if self.training else [], real)
        assert hidden is not None
        return self.norm(hidden) if span.stop == self.config.num_hidden_layers else hidden

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens `[B, S]`, without positions: `[B, S, hidden_size]`."""
        hidden = self.embed(tokens)
        if self.config.scale_embeddings:
            hidden = hidden * torch.tensor(self.config.hidden_size**0.5, dtype=hidden.dtype)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[..., hidden_size]` -> `[..., vocab_size]`, soft-capped where the config says so."""
        part = self.blocks_part
        if part is None:
            logits = self.head(hidden)
        else:
            shape = (*hidden.shape[:-1], self.config.vocab_size)
            logits = part.shared(self.head(hidden) if part.head else hidden.new_empty(shape))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def auxiliary_loss(self) -> Tensor | None:
        """Load-balancing loss of the last forward in training mode, times its coefficient, 0-d.

        None without experts. Its gradient needs the graph of that forward: backward both in one call.
        """
        statistics, tokens = self.router
        if not statistics:
            return None
        if self.row_part is not None:
            sums = self.row_part.summed(torch.stack([torch.stack(pair) for pair in statistics]))
            statistics = [(probabilities, chosen) for probabilities, chosen in sums]
            tokens = self.row_part.summed(torch.as_tensor(tokens))
        return load_balancing_loss(statistics, tokens) * self.config.router_aux_loss_coef

    def _context(
        self, tokens: Tensor, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None
    ) -> tuple[Context, Tensor]:
        """What blocks share, and positions `[B or 1, S]` with none below 0."""
        batch, length = tokens.shape
        layout: AttentionLayout | None = AttentionLayout.rows(batch, length)
        real = query_positions = None
        attend = attention
        if cache is not None:
            if not cache.length:
                cache.reserve(0 if self.virtual_tokens is None else self.virtual_tokens.count)
            positions = query_positions = cache.begin(tokens, positions)
            if cache.length:
                layout = None
            elif cache.ragged:
                segments = torch.where(positions >= 0, 0, -1)
        if segments is not None:
            layout = AttentionLayout.from_segments(segments)
            if cache is None and self.row_part is not None:
                attend = self.row_part.attention
                segments = segments[:, self.row_part.columns(segments.shape[1])]
            real = (segments >= 0).flatten().to(tokens.device) if self.config.moe_layers else None
            if positions is None:
                positions = _restarting(segments).to(tokens.device)
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        if cache is None and self.virtual_tokens is not None:
            positions = positions + self.virtual_tokens.count
        limit = self.config.max_position_embeddings
        if self.config.position == "learned" and (last := int(positions.max())) >= limit:
            raise UserError(f"{last + 1} tokens: this {self.config.family} model has only {limit} positions")
        context = Context(layout, cache=cache, query_positions=query_positions, real=real, attention=attend)
        return context, positions.clamp(min=0)

    def _virtual(self, context: Context, positions: Tensor) -> tuple[Tensor | None, Context | None]:
        """Virtual tokens that are to run through the blocks, `[1, P, hidden_size]`, and their own context.

        None without them, where they are keys and values already, and where the cache holds them.
        """
        tokens = self.virtual_tokens
        if tokens is None or (context.cache is not None and context.cache.length):
            return None, None
        if tokens.per_layer:
            context.virtual = tokens.key_values()
            return None, None
        context.virtual = []
        first = Context(AttentionLayout.rows(1, tokens.count), virtual=context.virtual, reads_virtual=True)
        hidden, own = tokens.embedding.weight[None], tokens.positions()
        if self.config.position == "learned":
            hidden = hidden + self.embed_positions(own)
        self._turn(first, own, positions, hidden.dtype)
        return hidden, first

    def _turn(self, context: Context, positions: Tensor, reach: Tensor, dtype: torch.dtype) -> None:
        """Puts rotary positions into the context. (Learned ones are added to the embeddings.)

        reach: positions whose greatest one says how long a context is in use.
        """
        config = self.config
        if config.position == "learned" or context.rope is not None:
            return
        context.rope = self._tables(config.rope_theta, config.rope_scaling, positions, reach, dtype)
        if config.rope_local_theta is not None:
            context.local_rope = self._tables(config.rope_local_theta, None, positions, reach, dtype)

    def _tables(
        self,
        theta: float,
        scaling: dict[str, Any] | None,
        positions: Tensor,
        reach: Tensor,
        dtype: torch.dtype,
    ) -> Tables:
        """cos and sin; frequencies are kept for each device, and for the last length if they depend on it."""
        config = self.config
        length = None
        if scaling is not None and depends_on_length(scaling):
            used = int(reach.max()) + 1
            length = effective_length(scaling, config.max_position_embeddings, used)
        key = (theta, length, positions.device)
        if key not in self._frequencies:
            if length is not None:
                self._frequencies.clear()
            dim = int(config.head_dim * config.partial_rotary_factor)
            frequency, factor = rope_frequencies(theta, dim, scaling, config.max_position_embeddings, length)
            self._frequencies[key] = frequency.to(positions.device), factor
        return rope_tables(positions, *self._frequencies[key], dtype)

    def _outgrows(self, cache: KVCache, tokens: Tensor, positions: Tensor | None) -> bool:
        """Whether these tokens take longrope past its original context, where all frequencies change."""
        scaling = self.config.rope_scaling
        if scaling is None or scaling["rope_type"] != "longrope":
            return False
        original = scaling["original_max_position_embeddings"]
        last = int(cache.positions.max())
        end = last + tokens.shape[1] if positions is None else int(positions.max()) + cache.virtual
        return last < original <= end

    def _again(self, tokens: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
        """Read everything in the cache again together with the new tokens."""
        used, start = cache.length, cache.virtual
        before = cache.positions[:, start : start + used]
        before = torch.where(before < 0, before, before - start)
        if positions is None:
            positions = before[:, -1:] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
        tokens = torch.cat((cache.tokens[:, start : start + used], tokens), 1)
        positions = torch.cat((before, positions), 1)
        cache.truncate(0)
        return self(tokens, positions, cache=cache)[:, used:]


def _embedding(count: int, size: int) -> nn.Embedding:
    """Without values: drawing normal numbers on the meta device imports torch's compiler, 2 seconds."""
    return Embedding.from_pretrained(torch.empty(count, size), freeze=False)


def _restarting(segments: Tensor) -> Tensor:
    """Positions that count from 0 in each run of equal segments."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    start = torch.ones_like(segments, dtype=torch.bool)
    start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(start, index, 0).cummax(1).values
