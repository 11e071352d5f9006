"""What every room's tests may use: a tiny tokenizer and model on disk, and the path of ../shared.

Nothing here needs a network, and a model hub is never asked. All fixtures are made once per worker.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# Before torch is imported anywhere: two workers with a thread each beat one with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
# Converting a GGUF file takes seconds: tests share one cache, and leave the user's alone.
os.environ.setdefault("ROPEWALK_CACHE", str(ROOT / ".pytest_cache" / "ropewalk"))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# the same examples everywhere; to look for others: --hypothesis-profile=default
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template without {% generation %} markers, as most models have it."""

TINY_TEXT = [
    "The ropewalk is a long straight building in which loose fibre becomes rope.",
    "Many strands are laid in parallel, and what comes out at the other end is strong.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 1234567890",
]

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project, where there is one."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return path


@pytest.fixture(scope="session")
def run_as_script() -> Callable[[str, dict[str, str]], None]:
    """Runs a file of tests by itself, in an environment that is read when a library is imported."""

    def run(path: str, environment: dict[str, str]) -> None:
        done = subprocess.run(
            [sys.executable, path],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 384 tokens, with ChatML; ids: endoftext 0, im_start 1, im_end 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.save_pretrained(path)
    return path


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_dir: Path):
    """The tiny tokenizer as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A Hugging Face directory of a two-layer llama with random weights (seeded) and the tiny tokenizer."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("llama")
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, path)
    vocab = len(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"])
    config = {**TINY_CONFIG, "vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "config.json").write_text(json.dumps(config, indent=2))

    generator = torch.Generator().manual_seed(0)
    hidden, inner, kv = 32, 64, 2 * 8
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(2):
        block = f"model.layers.{i}"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{block}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.1 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


WORDS = (
    "rope walk fibre strand twist long building loose strong spin lay yarn hemp tar sail mast deck".split()
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 3 to 40 words, so that a row of 64 tokens holds one to several."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    random = Random(7)
    with path.open("w") as file:
        for number in range(60):
            text = " ".join(random.choice(WORDS) for _ in range(random.choice((3, 5, 8, 13, 20))))
            file.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, corpus: Path, tiny_llama_dir: Path) -> Callable[..., dict[str, Any]]:
    """`make_recipe(steps=4, adapt={...}, **train fields)`: a recipe whose files are all under tmp_path."""

    def make(
        adapt: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        evaluate: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **train: Any,
    ) -> dict[str, Any]:
        fields = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "threads": 1, "device": "cpu", **train}
        if "epochs" in train or "tokens" in train:
            del fields["steps"]
        return {
            "name": "tiny",
            "seed": 3,
            "runs": str(tmp_path / "runs"),
            "model": model or {"source": str(tiny_llama_dir)},
            "data": {
                "train": [{"path": str(corpus)}],
                "validation_fraction": 0.2,
                "sequence_length": 64,
                "directory": str(tmp_path / "prepared"),
                "workers": 1,
                **(data or {}),
            },
            "adapt": adapt or {},
            "train": {
                "precision": "float32",
                "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, **(optimizer or {})},
                **fields,
            },
            "evaluate": evaluate or {},
        }

    return make


@pytest.fixture
def copy_until() -> Callable[[Path, int, Path], Path]:
    """`copy_until(run, step, target)`: the run as a kill right after the checkpoint of `step` would have left
    it, a few records ahead."""

    def copy(run: Path, step: int, target: Path) -> Path:
        shutil.copytree(run, target)
        (target / "report.md").unlink()
        for checkpoint in (target / "checkpoints").iterdir():
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        return target

    return copy
