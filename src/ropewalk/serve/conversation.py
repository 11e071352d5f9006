"""A conversation with a model: it remembers the turns, and what of them is already in the KV cache."""

from collections.abc import Iterator
from typing import Any

import torch

from ropewalk.errors import UserError
from ropewalk.model import KVCache, Transformer
from ropewalk.serve.engine import Answer, decode, encode_prompt, new_cache, prefill, start_answers
from ropewalk.serve.sampling import Sampling

FIRST_CACHE = 4096
"""Tokens that the first cache holds; it is made again, twice as long, when they do not do."""


class Chat:
    """`say` answers one message in pieces; `messages` is the conversation so far.

    When the conversation no longer fits the model's context, its oldest turns are forgotten (never the
    system message): `dropped` counts them, and `notice` says so for the newest answer. Without a chat
    template there are no turns: raises UserError.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        system: str | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; this model continues text, it does not chat")
        self.model, self.tokenizer = model, tokenizer
        self.sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        self.max_new_tokens, self.stop, self.seed = max_new_tokens, stop, seed
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.dropped = 0
        self.notice: str | None = None
        self._cache: KVCache | None = None
        self._cached: list[int] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces. One that is broken off stays in the conversation as far as it got.

        Raises UserError when `text` alone is too long for the model; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = self._fit(messages)
        self.messages, self.dropped = messages, self.dropped + dropped
        self.notice = (
            f"the oldest {dropped} messages no longer fit the context and were dropped" if dropped else None
        )
        turn = sum(message["role"] == "user" for message in messages) + self.dropped
        (answer,) = start_answers(
            self.model, self.tokenizer, [ids], self.max_new_tokens, self.stop, self.sampling, self.seed + turn
        )
        try:
            yield from self._answer(answer)
        finally:
            if answer.text.strip():
                self.messages.append({"role": "assistant", "content": answer.text})
            else:  # templates want an answer between two questions, and it must say something
                self.messages.pop()
                self.notice = "the answer is empty; the message was forgotten"
            if self._cache is not None:
                self._cached = (answer.prompt + answer.tokens)[: self._cache.length]

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.notice, self.dropped = None, 0

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int], int]:
        """The messages, less the oldest turns where they leave no room; their ids; how many went."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns, dropped = messages[len(system) :], 0
        context = self.model.context_length
        room = context - min(self.max_new_tokens, context // 2)
        while True:
            ids = encode_prompt(system + turns, self.tokenizer)
            if len(ids) <= room:
                return system + turns, ids, dropped
            if len(turns) == 1:
                raise UserError(
                    f"the message makes {len(ids)} tokens; the model's context leaves room for {room}"
                )
            turns, dropped = turns[2:], dropped + 2

    @torch.inference_mode()
    def _answer(self, answer: Answer) -> Iterator[str]:
        """Runs what is new in the prompt, then the answer."""
        training = self.model.training
        self.model.eval()
        try:
            cache = self._cache_for(len(answer.prompt) + answer.limit)
            known = _common(self._cached, answer.prompt[:-1])
            cache.truncate(known)
            self._cached = answer.prompt
            hidden = prefill(self.model, [answer.prompt[known:]], cache, known)
            for _, piece in decode(self.model, [answer], cache, hidden, self.sampling):
                if piece:
                    yield piece
        finally:
            self.model.train(training)

    def _cache_for(self, length: int) -> KVCache:
        if self._cache is None or self._cache.max_length < length:
            longer = 2 * self._cache.max_length if self._cache is not None else FIRST_CACHE
            most = self.model.context_length
            self._cache = new_cache(self.model, 1, max(length, min(longer, most)))
            self._cached = []
        return self._cache


def _common(a: list[int], b: list[int]) -> int:
    """Length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
