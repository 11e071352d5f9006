"""Text from a model: prompts are batched, left-padded, run through one KV cache, and leave it as they end.

A call's work: tokenize the prompts, run what they all begin with once, then batch by batch (longest
first) the rest of the prompts and one token per row and step. Greedy answers are those of the uncached
model, and drawn ones depend only on the seed, the prompt and its place in the list, not on the batch.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import torch

from ropewalk.data import render_prompt
from ropewalk.errors import RopewalkError, UserError
from ropewalk.model import KVCache, Transformer
from ropewalk.serve.sampling import Sampling, choose
from ropewalk.serve.text import Detokenizer, StopStrings

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Plain text to go on with, a conversation to answer, or token ids to go on with as they are."""

PREFILL_TOKENS = 8192
"""Most tokens of a batch that go through the model at once: bounds the memory for long prompts."""
SHARED_WORTH = 64
"""Tokens that running a common prefix once must save; below, its own forward pass costs more."""


@dataclass(frozen=True)
class Completion:
    """An answer. `tokens` includes the token that ended it, `text` does not, nor a stop string."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def generate(
    model: Transformer,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    on_token: Callable[[int, str, bool], None] | None = None,
) -> list[Completion]:
    """The answers to `prompts`, in their order.

    An answer ends with an end-of-sequence or end-of-turn token, before the first of the `stop` strings,
    after `max_new_tokens`, or where the model's positions end. `on_token(prompt's index, new text, ended)`
    is called as text becomes certain. Raises UserError for settings out of range and for a prompt that
    is empty or leaves no room for an answer.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if isinstance(prompts, str):
        raise UserError("prompts is one string; give a list of prompts")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    answers = start_answers(model, tokenizer, prompts, max_new_tokens, stop, sampling, seed)
    done: dict[int, Completion] = {}
    for answer, piece in _run(model, answers, sampling, batch_size):
        if on_token is not None and (piece or answer.finished):
            on_token(answer.index, piece, answer.finished)
        if answer.finished:
            done[answer.index] = answer.completion()
    return [done[i] for i in range(len(done))]


def stream(
    model: Transformer,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """The answer to one prompt as `generate` gives it, in pieces that joined are its text."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    answers = start_answers(model, tokenizer, [prompt], max_new_tokens, stop, sampling, seed)
    for _, piece in _run(model, answers, sampling, 1):
        if piece:
            yield piece


@dataclass
class Answer:
    """A prompt and what was said to it so far."""

    index: int
    prompt: list[int]
    limit: int
    ends: frozenset[int]
    detokenizer: Detokenizer
    stop: StopStrings
    uniform: torch.Tensor
    """float64 `[most tokens]`: the random number for each token; empty when greedy."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, token: int) -> str:
        """Appends a token; gives the text that it makes certain."""
        self.tokens.append(token)
        ended = token in self.ends
        last = ended or len(self.tokens) >= self.limit
        piece = "" if ended else self.detokenizer.push(token)
        if last:
            piece += self.detokenizer.flush()
        piece = self.stop.push(piece)
        if ended or self.stop.stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        if last:
            piece += self.stop.flush()
        self.text += piece
        return piece

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self.text, self.tokens, self.finish_reason, len(self.prompt))


def start_answers(
    model: Transformer,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
    seed: int,
) -> list[Answer]:
    """An empty answer for each prompt. Raises UserError as `generate` does."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if isinstance(stop, str):
        raise UserError(f"stop is the string {stop!r}; give a list of strings")
    ends = end_tokens(model, tokenizer, stop)
    uniform: Sequence[torch.Tensor] = [torch.empty(0)] * len(prompts)
    if sampling.temperature > 0:
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"seed is {seed}; it must be a whole number of 64 bits")
        generator = torch.Generator().manual_seed(seed)
        most = min(max_new_tokens, model.context_length)
        uniform = torch.rand(len(prompts), most, generator=generator, dtype=torch.float64).unbind()
    answers = []
    for index, prompt in enumerate(prompts):
        ids = encode_prompt(prompt, tokenizer, f"prompt {index + 1}")
        room = model.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"prompt {index + 1} has {len(ids)} tokens; the model's context is "
                f"{model.context_length}, which leaves no room for an answer"
            )
        if min(ids) < 0 or max(ids) >= model.config.vocab_size:
            raise UserError(f"prompt {index + 1} has a token id outside 0..{model.config.vocab_size - 1}")
        answers.append(
            Answer(
                index,
                ids,
                min(max_new_tokens, room),
                ends,
                Detokenizer(tokenizer, ids),
                StopStrings(stop),
                uniform[index],
            )
        )
    return answers


def encode_prompt(prompt: Prompt, tokenizer: Any, name: str = "the prompt") -> list[int]:
    """Token ids of a prompt; plain text gets the special tokens that the tokenizer puts around texts."""
    if isinstance(prompt, str):
        if (bad := re.search("[\ud800-\udfff]", prompt)) is not None:
            raise UserError(f"{name} is not valid Unicode at character {bad.start()}")
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    elif isinstance(prompt, Mapping):
        raise UserError(f"{name} is one message; give a list of messages")
    elif prompt and isinstance(prompt[0], Mapping):
        ids = render_prompt([dict(message) for message in prompt], tokenizer)  # type: ignore[arg-type]
    else:
        try:
            ids = [operator.index(i) for i in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise UserError(f"{name} is neither text nor a list of messages or of token ids") from None
    if not ids:
        raise UserError(f"{name} is empty")
    return list(ids)


def end_tokens(model: Transformer, tokenizer: Any, stop: Sequence[str] = ()) -> frozenset[int]:
    """Ids that end an answer: the model's and the tokenizer's end of sequence, the chat template's end of
    turn, and stop strings that are a special token (which give no text to look for them in).
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {*model.config.eos_token_ids, *(special[s] for s in stop if s in special)}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        mark = "ropewalk"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        with suppress(jinja2.TemplateError):  # whoever renders a prompt with it will say so
            after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2].lstrip()
            ends.update(i for text, i in special.items() if after.startswith(text))
    return frozenset(ends)


@torch.inference_mode()
def _run(
    model: Transformer, answers: Sequence[Answer], sampling: Sampling, batch_size: int
) -> Iterator[tuple[Answer, str]]:
    """Yields (answer, new text) for every token of every answer."""
    training = model.training
    model.eval()
    try:
        prefix, shared = None, _common_prefix(answers)
        if shared:
            prefix = new_cache(model, 1, shared)
            prefill(model, [answers[0].prompt[:shared]], prefix)
        order = sorted(answers, key=lambda answer: -len(answer.prompt))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            capacity = len(batch[0].prompt) + max(answer.limit for answer in batch)
            if prefix is not None:
                cache = prefix.expand(len(batch), capacity)
            else:
                cache = new_cache(model, len(batch), capacity)
            hidden = prefill(model, [answer.prompt[shared:] for answer in batch], cache, shared)
            yield from decode(model, batch, cache, hidden, sampling)
    finally:
        model.train(training)


def new_cache(model: Transformer, rows: int, length: int) -> KVCache:
    """An empty cache for `rows` sequences of up to `length` tokens, in the model's type and place."""
    weight = model.embed.weight
    return KVCache(model.config, rows, length, weight.dtype, weight.device)


def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache, start: int = 0
) -> torch.Tensor:
    """Runs token ids that stand at positions `start`.. into the cache; gives the last hidden states `[B, H]`.

    Shorter prompts are padded on the left: the position -1 keeps padding out of everything.
    """
    longest, device = max(map(len, prompts)), model.embed.weight.device
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    positions = torch.full((len(prompts), longest), -1)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        positions[row, longest - len(prompt) :] = torch.arange(start, start + len(prompt))
    tokens, positions = tokens.to(device), positions.to(device)
    step = max(1, PREFILL_TOKENS // len(prompts))
    for at in range(0, longest, step):
        hidden = model(tokens[:, at : at + step], positions=positions[:, at : at + step], cache=cache)
    return hidden[:, -1]


def decode(
    model: Transformer, answers: Sequence[Answer], cache: KVCache, hidden: torch.Tensor, sampling: Sampling
) -> Iterator[tuple[Answer, str]]:
    """Grows the answers token by token, from the hidden states `[B, H]` of their prompts' last tokens.

    Answer i is row i of the cache; a row that ends is taken out of it, so that what is left runs faster.
    """
    active, device = list(answers), hidden.device
    seen = _seen_tokens(active, model.config.vocab_size, device) if sampling.repetition_penalty else None
    while True:
        logits = model.logits(hidden).float()
        uniform = None
        if sampling.temperature > 0:
            uniform = torch.stack([a.uniform[len(a.tokens)] for a in active]).to(device)
        chosen = choose(logits, sampling, seen, uniform)
        _refuse_nan(logits, chosen)
        for answer, token in zip(active, chosen.tolist(), strict=True):
            yield answer, answer.take(token)
        tokens = chosen.unsqueeze(1)
        if seen is not None:
            seen.scatter_(1, tokens, True)
        keep = _keep([answer.finished for answer in active])
        if not keep:
            return
        if len(keep) < len(active):
            active = [active[row] for row in keep]
            cache.select(keep)
            rows = torch.tensor(keep, device=device)
            tokens = tokens[rows]
            seen = None if seen is None else seen[rows]
        hidden = model(tokens, cache=cache)[:, -1]


def _refuse_nan(logits: torch.Tensor, chosen: torch.Tensor) -> None:
    """One look at the chosen tokens' logits: argmax and sums pass a NaN on."""
    if not logits.gather(1, chosen.unsqueeze(1)).isfinite().all():
        raise RopewalkError(
            "the model's logits are not finite: its weights are damaged, or overflow in this dtype"
        )


def _keep(finished: Sequence[bool]) -> list[int]:
    """The rows that go on, with the last ones moved into the gaps: so few rows of the cache are copied."""
    rows = list(range(len(finished)))
    for row in reversed(range(len(finished))):
        if finished[row]:
            last = rows.pop()
            if last != row:
                rows[row] = last
    return rows


def _seen_tokens(answers: Sequence[Answer], vocabulary: int, device: torch.device) -> torch.Tensor:
    seen = torch.zeros(len(answers), vocabulary, dtype=torch.bool, device=device)
    for row, answer in enumerate(answers):
        seen[row, answer.prompt] = True
    return seen


def _common_prefix(answers: Sequence[Answer]) -> int:
    """How many tokens all prompts begin with, leaving each one to run; 0 where sharing them saves little."""
    if len(answers) < 2:
        return 0
    prompts = [answer.prompt for answer in answers]
    first, last = min(prompts), max(prompts)  # what the first and last in order share, all share
    most = min(map(len, prompts)) - 1
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    return shared if shared * (len(prompts) - 1) >= SHARED_WORTH else 0
