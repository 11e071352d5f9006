"""What a run asks of each device, in plain values: all that the planner needs to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.model.config import ModelConfig
from ropewalk.plan.inputs import nearest

if TYPE_CHECKING:
    from ropewalk.recipe import Recipe

Count = Annotated[int, Field(gt=0)]
ALONE = Layout(replicate=1, shard=1)
"""one process"""


@dataclass(frozen=True)
class Work:
    """A run on this project's own training step. Fields have the recipe's names where it has one.

    Only what decides memory and time is here; `dataclasses.replace` makes the variants of a search. Who takes
    values from a user looks at them (`work_value`).
    """

    config: ModelConfig
    layout: Layout = ALONE
    """degrees over the processes, none of them -1"""
    sequence_length: Count = 1024
    """tokens in a row, of the whole row where processes share it"""
    micro_batch_size: Count = 1
    """rows in one forward pass of one process"""
    accumulation: Count = 1
    """micro-batches of an optimizer step, of one process"""
    precision: Literal["float32", "bfloat16", "float8"] = "bfloat16"

    method: Literal["full", "lora", "dora", "prompt", "prefix", "bottleneck", "ia3", "bitfit"] = "full"
    quantize: Literal["none", "nf4", "int8"] = "none"
    rank: Count = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    tokens: Count = 20
    """virtual tokens of prompt and prefix tuning"""
    freeze: tuple[str, ...] = ()

    optimizer: Literal["adamw", "lion", "muon", "adafactor"] = "adamw"
    state_bits: Literal[32, 8, 4] = 32
    masters: bool = True
    offload: bool = False
    """of the optimizer's states, masters and gradients, to the host"""
    in_backward: bool = False

    checkpointing: Literal["none", "full", "selective"] = "none"
    checkpointing_every: Count = 1
    checkpointing_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    activation_offload: bool = False
    compile: bool = False
    loss_chunk: Count = 1024

    scored: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the tokens that count in the loss"""
    document_length: Count | None = None
    """mean tokens of a document; None: each row is one document"""
    device: Literal["cpu", "cuda"] = "cuda"
    fused_attention: bool = True
    """scores are never written; False for systems from before FlashAttention (arXiv 2205.14135)"""
    fused_loss: bool = True
    """logits are made of some rows at a time and become gradients in place; False for a plain softmax of all
    of them in float32"""
    sequence_parallel: bool = True
    """tensor-parallel processes divide what is between the products, too (arXiv 2205.05198)"""
    reduce_bytes: Count = 4
    """of a gradient on its way to the other processes"""

    @property
    def parameter_bytes(self) -> int:
        """Of one weight as the model holds it."""
        return 4 if self.precision == "float32" else 2

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch that one process computes."""
        return self.micro_batch_size * self.sequence_length // self.layout.context

    @property
    def recomputed_share(self) -> float:
        """Of the blocks, those that checkpointing recomputes."""
        if self.checkpointing_budget is not None:
            return 1 - self.checkpointing_budget
        return 0.0 if self.checkpointing == "none" else 1 / self.checkpointing_every

    @property
    def batch_size(self) -> int:
        """Rows in an optimizer step, of all processes."""
        return self.micro_batch_size * self.accumulation * self.layout.data

    @property
    def step_tokens(self) -> int:
        """Tokens in an optimizer step, of all processes."""
        return self.batch_size * self.sequence_length


def work_value(name: str, value: Any, said: str | None = None) -> Any:
    """The value of a field of Work that a user gave, under the name `said`. UserError where it cannot be."""
    kinds = get_type_hints(Work, include_extras=True)
    if name not in kinds:
        raise UserError(f"{name}: no field of a run{nearest(name, kinds)}")
    try:
        given = tuple(value) if isinstance(value, list) else value
        return TypeAdapter(kinds[name]).validate_python(given, strict=True)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Input ")
        raise UserError(f"{said or name} {value}: it {why}") from None


@dataclass(frozen=True)
class Rows:
    """What the rows of an epoch hold, as prepared data say it."""

    rows: int
    scored: float
    """share of all their places, padding included, that counts in the loss"""
    document_length: int

    @classmethod
    def of(cls, split: Mapping[str, Any], packing: str, sequence_length: int) -> "Rows":
        """From a split's account in the report of a preparation."""
        rows = split["rows"][packing]
        share = split["scored"] / (rows * sequence_length)
        return cls(rows, share, max(1, round(split["tokens"] / split["documents"])))


def work_of(recipe: "Recipe", config: ModelConfig, processes: int, data: Rows | None = None) -> Work:
    """What a resolved recipe asks for, with a model of this shape, of each of so many processes.

    Without `data` every row is one document, all of it scored. UserError where the recipe's degrees do not
    make that many processes.
    """
    train, adapt, optimizer = recipe.train, recipe.adapt, recipe.train.optimizer
    said = Layout(**{field.name: getattr(recipe.parallel, field.name) for field in fields(Layout)})
    layout = said.over(processes)
    assert train.batch_size is not None  # resolved
    assert train.precision != "auto"
    assert train.device != "auto"
    own = max(1, train.batch_size // layout.data)
    micro = min(train.micro_batch_size or own, own)
    return Work(
        config,
        layout,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=micro,
        accumulation=own // micro,
        precision=train.precision,
        method=adapt.method,
        quantize=adapt.quantize,
        rank=adapt.rank,
        dropout=adapt.dropout,
        targets=adapt.targets,
        tokens=adapt.tokens,
        freeze=adapt.freeze,
        optimizer=optimizer.name,
        state_bits=optimizer.state_bits,
        masters=optimizer.masters,
        offload=optimizer.offload,
        in_backward=optimizer.in_backward,
        checkpointing=train.checkpointing,
        checkpointing_every=train.checkpointing_every,
        checkpointing_budget=train.checkpointing_budget,
        activation_offload=train.activation_offload,
        compile=train.compile,
        loss_chunk=train.loss_chunk,
        device=train.device,
        scored=data.scored if data else 1.0,
        document_length=data.document_length if data else None,
    )
