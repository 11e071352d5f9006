"""The typed recipe: every field there is, one line of doc each, frozen, unknown keys refused.

A field whose default is None or "auto" is *derived*: `derive.py` says what from, and
`ropewalk recipe show` prints the value beside the reason.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _no_boolean(value: Any) -> Any:
    """pydantic takes True for 1; a recipe that says `steps: true` is a mistake."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean_for_number", "true and false are no numbers")
    return value


# bounds right at the type: so the JSON Schema has them, too
NoBoolean = BeforeValidator(_no_boolean)
Positive = Annotated[int, Field(gt=0), NoBoolean]
Count = Annotated[int, Field(ge=0), NoBoolean]
PositiveNumber = Annotated[float, Field(gt=0), NoBoolean]
NonNegative = Annotated[float, Field(ge=0.0), NoBoolean]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), NoBoolean]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0), NoBoolean]
Metrics = Annotated[tuple[Literal["exact_match", "chrf", "rouge_l"], ...], Field(min_length=1)]


class Section(BaseModel):
    """Base of every part of a recipe: immutable, no unknown keys, field docs taken from the schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """`train:` with every line under it commented out is null in YAML, and means an empty section."""
        return {} if value is None else value


class Model(Section):
    source: str | None = None
    """Hugging Face directory or hub id, .gguf file, run directory, or package://DISTRIBUTION/FILE."""
    config: dict[str, Any] | str | None = None
    """Shape of a model from scratch: Hugging Face config fields, or a YAML/JSON file of them."""
    tokenizer: str | None = None
    """Where the tokenizer comes from; derived: model.source."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.source is None) == (self.config is None):
            both = "model.source (a pretrained model) and model.config (from scratch)"
            raise ValueError(f"give exactly one of {both}")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model from scratch needs model.tokenizer")
        return self


class Source(Section):
    """One set of documents."""

    path: str
    """A file (JSONL, Parquet, CSV, text, HTML, PDF, ...), a folder, a glob, or a URL; see docs/data.md."""
    name: str | None = None
    """Name of the source in reports; derived: the path's last part."""
    text: str | None = None
    """Column that holds plain text; derived: `text` where the file has it."""
    messages: str | None = None
    """Column that holds a list of {role, content}; derived: `messages` where the file has it."""
    prompt: str | None = None
    """Column that holds the prompt; derived: `prompt` where the file has it."""
    completion: str | None = None
    """Column that holds the completion; derived: `completion` where the file has it."""


class Clean(Section):
    """What is looked at in every training document, and which are kept; docs/data.md lists attributes."""

    repair: bool = False
    """Undo mojibake, compose Unicode, take out control characters, before anything else."""
    rules: tuple[Literal["gopher", "gopher_repetition", "c4", "fineweb"], ...] = ()
    """Published sets of rules; what all of them keep is kept. c4 also cuts lines out."""
    keep: dict[str, str | None] = {}
    """Own rules: name to a SQL expression over attributes, as in `words >= 50`; null leaves a rule out."""
    duplicates: tuple[Literal["exact", "near", "paragraphs", "lines", "passages"], ...] = ()
    """exact and near leave documents out; paragraphs, lines and passages (50 words) cut repeats out."""
    similarity: Annotated[float, Field(gt=0.0, lt=1.0), NoBoolean] = 0.8
    """Near duplicates share at least this part of their runs of five words (Jaccard)."""
    prefer: str | None = None
    """SQL expression: of duplicates the one with the highest value is kept; derived: the first."""
    against: tuple[str, ...] = ()
    """Files of evaluation items to find in the training documents."""
    contaminated: Literal["drop", "mask", "keep"] = "drop"
    """What becomes of documents with such items: left out, the places not scored, or only reported."""
    pii: Literal["keep", "mask", "drop"] = "keep"
    """Personal data (e-mail, IP, phone, cards, keys): mask puts <email> and so on in its place."""
    quality: str | None = None
    """Classifier from `ropewalk data classifier`: gives the attribute quality, 0 to 1."""
    model: str | None = None
    """Model, as in model.source, for the attributes perplexity, bits_per_byte and similar_of."""
    score: str | None = None
    """SQL expression kept with each document, for data.curriculum=score."""


class TrainingSource(Source):
    """One set of documents to train on."""

    weight: PositiveNumber | None = None
    """Share of an epoch's tokens beside the other sources'; all have one or none. docs/recipe.md."""


class Data(Section):
    train: tuple[TrainingSource, ...]
    """What to train on."""
    temperature: Annotated[float, Field(ge=1.0), NoBoolean] = 1.0
    """Shares of sources as tokens^(1/temperature): above 1, small ones get more (arXiv 1911.02116)."""
    curriculum: Literal["none", "length", "score"] = "none"
    """Documents of an epoch in ten stages: shortest first, or those of the lowest score."""
    validation: tuple[Source, ...] = ()
    """What to validate on; where empty, documents are split off the training sources by hash."""
    validation_fraction: Fraction = 0.02
    """Share of documents split off for validation when data.validation is empty; 0 for none."""
    sequence_length: Positive = 1024
    """Tokens in a row; no document is longer, but with packing concat."""
    packing: Literal["best_fit", "none", "concat"] = "best_fit"
    """Rows: whole documents, several (none sees another) or one; concat: all end to end, cut into rows."""
    too_long: Literal["auto", "error", "truncate", "split", "drop"] = "auto"
    """A document longer than a row: auto splits plain text and refuses conversations. The report counts."""
    score: Literal["auto", "all", "assistant"] = "auto"
    """Which tokens count in the loss: auto is everything for text, the assistant's for conversations."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's."""
    append_eos: bool = True
    """End each plain-text document with the end-of-sequence token."""
    max_bad_rows: Count = 0
    """How many unreadable rows may be skipped (they are listed in the report)."""
    workers: Count = 0
    """Processes that read and clean, threads that tokenize; 0: as many as there are cores."""
    clean: Clean = Clean()
    directory: str = "prepared"
    """Where prepared data is kept; each data set in a folder named by the content it was made from."""

    @model_validator(mode="after")
    def _one_mixture(self) -> "Data":
        without = [source.path for source in self.train if source.weight is None]
        if without and len(without) < len(self.train):
            raise ValueError(f"give every source of data.train a weight or none; {without[0]} has none")
        if not without and self.temperature != 1.0:
            raise ValueError("give weights of sources or data.temperature, not both")
        return self


class Adapt(Section):
    method: Literal["full", "lora", "dora", "prompt", "prefix", "bottleneck", "ia3", "bitfit"] = "full"
    """Train every weight, or little beside frozen ones; docs/adapt.md compares them."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen matrices in 4 bits (with lora: QLoRA, arXiv 2305.14314), or in 8 with a scale a row."""
    rank: Positive = 16
    """Rank of the LoRA matrices; width of bottleneck adapters."""
    alpha: PositiveNumber | None = None
    """LoRA scale is alpha / rank; derived: 2 x rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dropout: BelowOne = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names to adapt (q_proj, v_proj, ...), or all linear layers but the output head."""
    tokens: Positive = 20
    """Virtual tokens of prompt and prefix tuning."""
    b_rate: PositiveNumber = 1.0
    """Learning rate of LoRA's B as a multiple of A's (LoRA+, arXiv 2402.12354, takes 16)."""
    freeze: tuple[str, ...] = ()
    """With method full: patterns of parameter names that stay as they are (embed.*, blocks.0.*)."""


class Optimizer(Section):
    name: Literal["adamw", "lion", "muon", "adafactor"] = "adamw"
    """AdamW (arXiv 1711.05101), Lion (2302.06675), Muon for matrices (2502.16982), Adafactor (1804.04235)."""
    learning_rate: PositiveNumber | None = None
    """Peak learning rate; derived: 2e-4 for LoRA, 2e-5 for full fine-tuning, 6e-4 from scratch."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only (not on biases, norms, embeddings)."""
    beta1: BelowOne | None = None
    """Decay of the first moment; derived: 0.9, for Muon 0.95."""
    beta2: BelowOne | None = None
    """Decay of the second moment; derived: 0.95, for Lion 0.99."""
    epsilon: PositiveNumber = 1e-8
    """Added to the root of the second moment."""
    state_bits: Literal[32, 8, 4] = 32
    """Bits of each number of the optimizer's state (arXiv 2110.02861)."""
    masters: bool = True
    """Keep float32 copies of bfloat16 weights; without, updates round at random (arXiv 2010.06192)."""
    offload: bool = False
    """Keep states, masters and gradients in the host's memory and update there (arXiv 2101.06840)."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is known, and free that."""


class Schedule(Section):
    name: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: Count | None = None
    """Steps of linear warm-up; derived: warmup_fraction of the run."""
    warmup_fraction: Fraction = 0.03
    """Share of the run spent warming up, where warmup_steps is not given."""
    decay_fraction: Fraction = 0.2
    """Share of the run in which warmup_stable_decay falls."""
    minimum: Fraction = 0.1
    """Last learning rate as a share of the peak."""


class Spike(Section):
    """What is done about a loss far above those before it, or one that is not finite; docs/surviving.md."""

    policy: Literal["none", "stop", "skip", "rollback"] = "none"
    """none: record it (or stop, if not finite); stop; skip: drop the update; rollback: leave the data out."""
    threshold: PositiveNumber = 6.0
    """Robust z-score of a step's loss above which it is a spike."""
    window: Positive = 64
    """Steps that a loss is compared with; half of them come before anything is called a spike."""
    leave_out: Positive = 1
    """Steps whose samples a rollback leaves out: the one that spiked, and those right before it."""
    limit: Positive = 10
    """Skipped steps, or rollbacks, after which the next spike stops the run."""


class Train(Section):
    steps: Positive | None = None
    """Length of the run in optimizer steps (one of steps, epochs, tokens)."""
    epochs: PositiveNumber | None = None
    """Length of the run in passes over the training rows."""
    tokens: Positive | None = None
    """Length of the run in tokens, padding included."""
    batch_size: Positive | None = None
    """Rows in an optimizer step (one of batch_size and batch_tokens); derived: 8."""
    batch_tokens: Positive | None = None
    """Tokens in an optimizer step; rounded to whole rows of data.sequence_length."""
    micro_batch_size: Positive | None = None
    """Rows in one forward pass; derived: as many as are 8,192 tokens on a GPU, 2,048 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """Type of the computation; auto: bfloat16 where it is fast. float8: in large products, on new GPUs."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: NonNegative = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    spike: Spike = Spike()
    verify_every: Count = 0
    """Steps between those that are computed twice and compared bit by bit; 0: none. docs/surviving.md."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations kept: all, each block's input (arXiv 1604.06174), or results of products as well."""
    checkpointing_every: Positive = 1
    """Recompute one block in so many."""
    checkpointing_budget: Fraction | None = None
    """Share of the activations that may be kept: chooses the two fields above."""
    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in the host's memory; copies overlap with the computation."""
    compile: bool = False
    """torch.compile each block: faster steps for a slower first one."""
    cuda_graphs: bool = False
    """Replay compiled blocks as CUDA graphs; needs train.compile and a GPU."""
    self_check: bool = True
    """Compare loss and gradients with the plain formulas on the first batch before anything is trained."""
    loss_chunk: Positive = 1024
    """Rows of the output head computed at once."""
    threads: Count = 0
    """CPU threads of each process; 0: its share of the cores."""
    log_every: Positive = 1
    """Steps between lines of metrics."""
    evaluate_every: Count = 0
    """Steps between validation losses; 0: only before the first and after the last step."""
    evaluate_rows: Positive = 64
    """Validation rows in each of those."""
    sample_every: Count = 0
    """Steps between generations from the prompt panel; 0: only after the last step."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: only after the last step."""
    checkpoint_minutes: PositiveNumber | Literal["auto"] | None = None
    """Minutes between checkpoints by the clock, besides those by steps; auto: from train.failure_hours."""
    failure_hours: PositiveNumber | None = None
    """Mean hours between failures of the whole run, for checkpoint_minutes: auto (Daly 2006)."""
    keep: Positive = 2
    """Newest checkpoints kept, besides the best."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if sum(x is not None for x in (self.steps, self.epochs, self.tokens)) != 1:
            raise ValueError("give exactly one of train.steps, train.epochs and train.tokens")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("give one of train.batch_size and train.batch_tokens, not both")
        if (self.checkpoint_minutes == "auto") != (self.failure_hours is not None):
            raise ValueError("train.checkpoint_minutes: auto and train.failure_hours go together: give both")
        return self


class Parallel(Section):
    replicate: Positive | Literal[-1] = 1
    """Groups of processes with a whole model each; -1: the rest of the processes."""
    shard: Positive | Literal[-1] = -1
    """Processes that share one model, each with a part of it; -1: the rest of the processes."""
    context: Positive = 1
    """Processes that share the tokens of each row, for long rows."""
    context_exchange: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """How attention reaches the others' tokens: all keys at once, keys in turn, or tokens for heads."""
    tensor: Positive = 1
    """Processes that share every matrix product (arXiv 1909.08053), and the tokens between them."""
    pipeline: Positive | Literal[-1] = 1
    """Groups of processes that each have some blocks, for one micro-batch after the other; -1: the rest."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zb", "zbv"] = "1f1b"
    """Order of passes (arXiv 1811.06965, 1806.03377, 2104.04473, and without bubbles 2401.10241)."""
    pipeline_stages: Positive | None = None
    """Runs of blocks in each process; unless told, 2 for interleaved-1f1b, interleaved-zb and zbv, else 1."""
    expert: Positive | Literal[-1] = 1
    """Processes, of those with the same blocks, that divide the experts of a mixture; -1: all of them."""
    stage: Literal[1, 2, 3] = 3
    """Divide optimizer states (1), gradients too (2), weights too (3): ZeRO, arXiv 1910.02054."""
    hang_seconds: PositiveNumber | None = None
    """Seconds without progress in a step after which a run is ended; unless told, learned from the steps."""
    restarts: Count = 3
    """How often processes that Ropewalk started itself are started again when one is killed."""


class Planned(Parallel):
    """`parallel: auto`: the planner chooses when training begins; until then pure sharding over all."""


def _auto_layout(value: Any) -> Any:
    return Planned() if value == "auto" else value


class Task(Section):
    """A generation task: prompts with references from a JSONL file."""

    name: str
    """Name in reports."""
    path: str
    """JSONL with `messages` (the last one is the reference) or `prompt` and `completion`."""
    metrics: Metrics = ("exact_match", "chrf")
    """How an answer is compared with its reference."""
    instruction: str | None = None
    """Text put before every prompt (shown to the model, not scored)."""
    shots: Count = 0
    """Worked examples put before the prompt, taken from shots_path."""
    shots_path: str | None = None
    """JSONL the examples come from; derived: nothing, and shots must be 0."""
    limit: Positive | None = None
    """Use the first so many rows; derived: all."""
    max_new_tokens: Positive = 64
    """Longest answer."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""


class Evaluate(Section):
    perplexity: tuple[str, ...] = ()
    """Text files (or JSONL with `text`) to measure perplexity on."""
    window: Positive | None = None
    """Tokens the model sees at once in perplexity; derived: data.sequence_length."""
    stride: Positive | None = None
    """Tokens scored per window; derived: half the window."""
    tasks: tuple[Task, ...] = ()
    """Generation tasks."""
    base: tuple[Task, ...] = ()
    """Prompts for the untrained model in `ropewalk run`: its fairest chance; derived: the same as tasks."""
    prompts: tuple[Annotated[str, Field(pattern=r"\S")], ...] = ()
    """The fixed prompt panel, answered at every checkpoint."""
    max_new_tokens: Positive = 64
    """Longest answer in the prompt panel."""
    batch_size: Positive = 16
    """Prompts generated at once."""


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is RUNS/NAME-ID."""
    seed: Annotated[int, Field(ge=0, lt=2**32), NoBoolean] = 0
    """Seed of everything that is random."""
    runs: str = "runs"
    """Folder that holds run directories."""
    model: Model
    data: Data
    adapt: Adapt = Adapt()
    train: Train
    parallel: Annotated[
        Parallel, BeforeValidator(_auto_layout, json_schema_input_type=Parallel | Literal["auto"])
    ] = Parallel()
    """How the run is spread over processes; "auto": as `ropewalk plan` finds best for those there are."""
    evaluate: Evaluate = Evaluate()
