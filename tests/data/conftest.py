"""Chat templates of every common style, each with an account in Python of what it writes and scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Messages = list[dict[str, str]]
Pieces = list[tuple[str, bool]]
"""(text, whether the assistant wrote it), one after the other."""

SPECIAL = (
    "<pad> <s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> [INST] [/INST] <bos> <start_of_turn> <end_of_turn>"
).split()
TEXT = [
    "The ropewalk is a long straight building in which loose fibre becomes rope.",
    "def add(a, b):\n    return a + b\n\n\nclass A:\n        pass\n" * 4,
    "system user assistant model Assistant: Answer: yes no \n\n    \n        \n",
    "Zwölf Boxkämpfer jagen Viktor 🙂🙂 1234567890 </think> <think>\n\n</think>\n\n",
]


@dataclass(frozen=True)
class Style:
    """A template, and the same in Python: the independent expectation of its tests."""

    template: str
    pieces: Callable[[Messages], Pieces]
    system: bool = True


def chatml(messages: Messages, default: str = "") -> Pieces:
    pieces: Pieces = []
    if default and messages[0]["role"] != "system":
        pieces.append((f"<|im_start|>system\n{default}<|im_end|>\n", False))
    for m in messages:
        pieces.append((f"<|im_start|>{m['role']}\n", False))
        pieces.append((m["content"] + "<|im_end|>", m["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return pieces


def mistral(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        answer = m["role"] == "assistant"
        pieces.append((f" {m['content']}</s>" if answer else f"[INST] {m['content']} [/INST]", answer))
    return pieces


def gemma(messages: Messages) -> Pieces:
    pieces: Pieces = [("<bos>", False)]
    for m in messages:
        role = "model" if m["role"] == "assistant" else m["role"]
        pieces.append((f"<start_of_turn>{role}\n", False))
        pieces.append((m["content"].strip() + "<end_of_turn>", role == "model"))
        pieces.append(("\n", False))
    return pieces


def zephyr(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces.append((f"<|{m['role']}|>\n", False))
        pieces.append((m["content"] + "</s>", m["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def qwen3(messages: Messages) -> Pieces:
    """Thinking stays in the turns after the last question only; there, even no thinking is written out."""
    last_question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    pieces: Pieces = []
    for i, m in enumerate(messages):
        pieces.append((f"<|im_start|>{m['role']}\n", False))
        content = m["content"]
        if m["role"] == "assistant":
            thought, _, answer = content.rpartition("</think>")
            thought = thought.split("<think>")[-1].strip("\n")
            content = answer.lstrip("\n")
            if i > last_question:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
        pieces.append((content + "<|im_end|>", m["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def plain(messages: Messages) -> Pieces:
    """Without any special token: nothing ends an answer."""
    pieces: Pieces = []
    for m in messages:
        pieces.append((f"### {m['role']}:\n", False))
        pieces.append((m["content"], m["role"] == "assistant"))
        pieces.append(("\n\n", False))
    return pieces


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "You are a helpful assistant."
MARKED = """{% for m in messages %}
{%- if m['role'] == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
QWEN3 = """{%- set ns = namespace(last=-1) %}{% for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[-2].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1] %}{% endif %}
{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content.lstrip('\n') }}{% endif %}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DEFAULTED = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}" + CHATML
)

STYLES = {
    "chatml": Style(CHATML, chatml),
    "default system": Style(DEFAULTED, lambda m: chatml(m, DEFAULT_SYSTEM)),
    "marked": Style(MARKED, chatml),
    "llama3": Style(LLAMA3, llama3),
    "mistral": Style(MISTRAL, mistral, system=False),
    "gemma": Style(GEMMA, gemma, system=False),
    "zephyr": Style(ZEPHYR, zephyr),
    "qwen3": Style(QWEN3, qwen3),
    "plain": Style(PLAIN, plain),
}
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}


MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen split a text before BPE; GPT-2's way is ByteLevel's own."""


def train_bpe(splitter: str) -> str:
    """A byte-level BPE that knows the control tokens of all styles, as JSON."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter == "gpt2")
    if splitter == "modern":
        split = pre_tokenizers.Split(Regex(MODERN), behavior="isolated")
        byte_level = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 8, trainer)
    return tokenizer.to_str()


def load(backend: str) -> dict[str, Any]:
    """A transformers tokenizer for each style; "none" has no chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend),
            bos_token=BOS.get(name, "<s>"),
            eos_token="</s>",
            pad_token="<pad>",
            chat_template=STYLES[name].template if name in STYLES else None,
            clean_up_tokenization_spaces=False,
        )
        for name in [*STYLES, "none"]
    }


@pytest.fixture(autouse=True)
def disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation of a few documents makes a hundred files, and takes its time to see each on the disk;
    nothing here is about a machine that loses its power."""
    monkeypatch.setattr("ropewalk.files.fsync", lambda path: None)


@pytest.fixture(scope="session")
def backend() -> str:
    return train_bpe("modern")


@pytest.fixture(scope="session")
def tokenizers(backend: str) -> dict[str, Any]:
    """For each style a tokenizer that splits white space as Llama 3 does."""
    return load(backend)


@pytest.fixture(scope="session")
def gpt2_tokenizers() -> dict[str, Any]:
    """For each style a tokenizer that splits white space as GPT-2 does: by what follows it."""
    return load(train_bpe("gpt2"))


@pytest.fixture
def styles() -> dict[str, Style]:
    return STYLES


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """write(name, content) makes a file below tmp_path."""
    return lambda name, content: _write(tmp_path, name, content)


@pytest.fixture
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """make_shards(lengths, seed=0, shard_tokens=...) writes documents of random tokens and opens them.

    Document i is "d<i>", from sources[i] (by default "even" and "odd" in turn), with scores[i] where given.
    """
    from ropewalk.data.shards import ShardWriter, TokenShards

    def make(
        lengths: list[int],
        seed: int = 0,
        vocab: int = 1000,
        sources: list[str] | None = None,
        scores: list[float] | None = None,
        **options: Any,
    ) -> TokenShards:
        random = np.random.default_rng(seed)
        folder = tmp_path_factory.mktemp("shards") / "train"
        writer = ShardWriter(folder, vocab, **options)
        for i, length in enumerate(lengths):
            ids, scored = random.integers(0, vocab, length), random.random(length) < 0.5
            source = sources[i] if sources else ("even", "odd")[i % 2]
            writer.add(ids, scored, f"d{i}", source, scores[i] if scores else None)
        writer.close()
        return TokenShards.open(folder)

    return make
