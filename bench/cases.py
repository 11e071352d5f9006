"""What is compared: each case is one piece of work, and how Ropewalk and each peer are set up to do it.

The rule: shapes, tokens, precision of the computation, optimizer, LoRA rank and targets, and what is
recomputed are the same; what a tool does better with the same work is what is measured. A peer without a
suffix is set up as its documentation has it. A suffix says what was changed by hand.
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One way of doing a case's work: the script in sides/, the environment it runs in, what it is told."""

    script: str
    environment: str | None
    """A key of environments.PEERS; None: the interpreter that runs the benchmark."""
    settings: dict[str, Any]
    batch_size: int | None = None
    """Rows in a step where they are not the case's: the tool counts examples, not packed rows."""


@dataclass(frozen=True)
class Case:
    """A piece of work. `recipe` is what Ropewalk is told beside it, by dotted name."""

    device: str
    shape: str
    """A key of shapes.SHAPES; "demo": the pretrained model of recipes/quickstart.yaml, of 135M's shape."""
    sequence_length: int
    batch_size: int
    """Rows of sequence_length tokens in an optimizer step."""
    learning_rate: float
    scratch: bool = False
    rank: int | None = None
    conversations: bool = False
    """The quickstart's conversations, one epoch; else documents of random words."""
    median: int | None = None
    """Tokens of the median document (log-normal); None: each fills a row."""
    micro_batch_size: int | None = None
    steps: int = 6
    contexts: tuple[int, ...] = ()
    """Not empty: Ropewalk alone, with rows of these many tokens one after the other until it fails."""
    blocks: int | None = None
    """Of the shape's blocks only so many, and memory is taken up for the weights and adapters of the others
    (each block of a long row takes minutes and the same memory; what it keeps is on the host)."""
    recipe: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)


def _trainer(dtype: str, **arguments: Any) -> Peer:
    liger = bool(arguments.get("use_liger_kernel"))
    settings = {"dtype": dtype, "arguments": {"bf16": True} | arguments}
    return Peer("with_trainer.py", "liger" if liger else "trl", settings)


def _trl(environment: str = "trl", batch_size: int | None = None, **settings: Any) -> Peer:
    return Peer("with_trl.py", environment, {"arguments": {}} | settings, batch_size)


def _litgpt(method: str, precision: str, batch_size: int | None = None) -> Peer:
    return Peer("with_litgpt.py", "litgpt", {"method": method, "precision": precision}, batch_size)


def _torchtune(batch_size: int | None = None, compiled: bool = False) -> Peer:
    return Peer("with_torchtune.py", "torchtune", {"compile": compiled}, batch_size)


def _plain(compiled: bool) -> Peer:
    return Peer("plain_pytorch.py", None, {"compile": compiled})


# What TRL does otherwise: float32 weights, and every block's activations recomputed
BY_HAND = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True, "gradient_checkpointing": False}
EXAMPLES = 8
"""Examples in a step of the tools that pad: Trainer's and TRL's default, about 1,080 of the demo's tokens."""

_FULL = Case(
    "cpu",
    "demo",
    512,
    4,
    5e-5,
    conversations=True,
    peers={
        "trainer": _trainer("float32"),
        "litgpt": _litgpt("full", "bf16-true", EXAMPLES),
        "torchtune": _torchtune(EXAMPLES),
    },
)
_SCRATCH = Case(
    "cpu",
    "30m",
    1024,
    4,
    6e-4,
    scratch=True,
    micro_batch_size=4,
    recipe={"train.compile": True, "train.optimizer.weight_decay": 0.1},
    peers={
        "nanogpt": _plain(compiled=True),
        "nanogpt-eager": _plain(compiled=False),
        "litgpt": _litgpt("pretrain", "bf16-mixed"),
    },
)
CPU: dict[str, Case] = {
    "lora": Case(
        "cpu",
        "demo",
        512,
        4,
        1e-3,
        rank=16,
        conversations=True,
        peers={
            # TRL's own choice is bfloat16 autocast on float32 weights, recomputation, 8 examples
            "trl": _trl(),
            "trl-by-hand": _trl(arguments=BY_HAND | {"packing": True, "per_device_train_batch_size": 4}),
            "litgpt": _litgpt("lora", "bf16-true", EXAMPLES),
            "torchtune": _torchtune(EXAMPLES),
        },
    ),
    "full": _FULL,
    # weights, gradients and no more than the moments wider: what Trainer does with a bfloat16 model
    "full-bf16": replace(
        _FULL,
        recipe={"train.optimizer.masters": False},
        peers={"trainer-bf16": _trainer("bfloat16")},
    ),
    "scratch": _SCRATCH,
    # texts as small models are trained on (stories, questions with answers): several in a row
    "scratch-short": replace(_SCRATCH, median=220),
    "qlora": Case(
        "cpu",
        "llama-3.2-1b",
        512,
        1,
        2e-4,
        rank=16,
        steps=3,
        # what a machine of 4 GB would be told: recompute, and few rows of the head at once
        recipe={"adapt.quantize": "nf4", "train.checkpointing": "full", "train.loss_chunk": 128},
        peers={"trl": _trl(nf4=True, arguments={"bf16": True, "gradient_checkpointing": True})},
    ),
}

_LLAMA_LORA = Case(
    "cuda",
    "llama-3-8b",
    4096,
    8,
    2e-4,
    rank=16,
    micro_batch_size=1,
    steps=5,
    recipe={"train.compile": True, "train.loss_chunk": 4096},
    peers={
        "liger": _trainer("bfloat16", use_liger_kernel=True),
        "trl": _trl(arguments=BY_HAND),
        "litgpt": _litgpt("lora", "bf16-true"),
        "torchtune": _torchtune(compiled=True),
        "unsloth": _trl("unsloth", arguments=BY_HAND, unsloth=True),
    },
)
_PRETRAIN = Case(
    "cuda",
    "llama-3.2-1b",
    4096,
    16,
    6e-4,
    scratch=True,
    micro_batch_size=4,
    steps=6,
    recipe={"train.compile": True, "train.loss_chunk": 8192, "train.optimizer.weight_decay": 0.1},
    peers={"litgpt": _litgpt("pretrain", "bf16-mixed"), "nanogpt": _plain(compiled=True)},
)
CUDA: dict[str, Case] = {
    "llama3-8b-lora": _LLAMA_LORA,
    "llama3.2-3b-full": Case(
        "cuda",
        "llama-3.2-3b",
        4096,
        8,
        2e-5,
        micro_batch_size=1,
        steps=5,
        # Peers hold weights, gradients and both moments in bfloat16: 8 bytes a weight. Here gradients are
        # added up in float32, so that moments have 8 bits; and compiled blocks make again what is cheap.
        recipe={
            "train.compile": True,
            "train.checkpointing": "selective",
            "train.loss_chunk": 4096,
            "train.optimizer.masters": False,
            "train.optimizer.state_bits": 8,
        },
        peers={
            "liger": _trainer("bfloat16", use_liger_kernel=True),
            "trl": _trl(arguments=BY_HAND),
            "litgpt": _litgpt("full", "bf16-true"),
            "torchtune": _torchtune(compiled=True),
        },
    ),
    "llama3.2-1b-pretrain": _PRETRAIN,
    "llama3.2-1b-pretrain-float8": replace(
        _PRETRAIN, recipe=_PRETRAIN.recipe | {"train.precision": "float8"}
    ),
    "llama3-8b-qlora-context": Case(
        "cuda",
        "llama-3-8b",
        131072,
        1,
        2e-4,
        rank=32,
        steps=1,
        blocks=2,
        contexts=(350000, 450000),
        recipe={
            "adapt.quantize": "nf4",
            "train.checkpointing": "full",
            "train.activation_offload": True,
            "train.loss_chunk": 4096,
        },
    ),
}
CASES = CPU | CUDA


def quick(case: Case) -> Case:
    """The same case with a tiny shape and few short rows: shows that all of it runs, and measures nothing."""
    rows: Any = {
        "sequence_length": 64,
        "batch_size": 2,
        "micro_batch_size": 1,
        "steps": 3,
        "conversations": False,
    }
    recipe = {name: value for name, value in case.recipe.items() if name not in ("train.compile",)}
    peers = {
        name: replace(
            peer,
            batch_size=None,
            settings=peer.settings | ({"compile": False} if "compile" in peer.settings else {}),
        )
        for name, peer in case.peers.items()
    }
    contexts = tuple(64 * 2**i for i in range(min(2, len(case.contexts))))
    short = {"shape": "tiny", "contexts": contexts, "blocks": None}
    return replace(case, recipe=recipe, peers=peers, **short, **rows)
