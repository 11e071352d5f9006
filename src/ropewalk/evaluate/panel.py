"""The prompt panel: the same few prompts answered at every checkpoint, to be read side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.model import Transformer
from ropewalk.serve import generate


@dataclass(frozen=True)
class Sample:
    """A prompt of the panel and the model's greedy answer."""

    prompt: str
    answer: str


def run_panel(
    model: Transformer, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 16
) -> list[Sample]:
    """Greedy answers: to a user's message where the tokenizer has a chat template, else a continuation."""
    chat = bool(tokenizer.chat_template)
    asked = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
    answers = generate(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [Sample(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]


def panel_markdown(samples: Sequence[Sample]) -> str:
    """The panel to read: each prompt with its answer, quoted."""
    return "\n".join(f"**{_line(s.prompt)}**\n\n{_quote(s.answer)}\n" for s in samples)


def _line(text: str) -> str:
    return " ".join(text.split())


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines()) or "> (nothing)"
