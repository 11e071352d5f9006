"""A chat is the same with and without its cache, forgets the oldest first, and says so."""

import pytest
import torch

from ropewalk.errors import UserError
from ropewalk.serve import Chat, conversation, generate

SAYINGS = ["The rope is", "What of the strands?", "And then?"]


def _plain(model, tokenizer, **options):
    """The conversation with everything run anew for each answer."""
    messages = []
    for text in SAYINGS:
        messages.append({"role": "user", "content": text})
        (answer,) = generate(model, tokenizer, [messages], **options)
        messages.append({"role": "assistant", "content": answer.text})
    return messages


@pytest.fixture
def long_context(models):
    """The llama with room for a conversation."""
    import dataclasses

    _, model = models("llama")
    kept = model.config
    model.config = dataclasses.replace(kept, max_position_embeddings=1024)
    yield model
    model.config = kept


def test_a_conversation_equals_one_without_a_cache(long_context, tiny_tokenizer):
    chat = Chat(long_context, tiny_tokenizer, max_new_tokens=12)
    for text in SAYINGS:
        said = "".join(chat.say(text))
        assert said == chat.messages[-1]["content"]
    assert chat.messages == _plain(long_context, tiny_tokenizer, max_new_tokens=12)
    assert chat.notice is None


def test_what_was_said_before_is_not_run_again(long_context, tiny_tokenizer, monkeypatch):
    chat = Chat(long_context, tiny_tokenizer, system="You are a rope.", max_new_tokens=4)
    ran = []
    forward = long_context.forward
    monkeypatch.setattr(long_context, "forward", lambda t, **k: (ran.append(t.shape[1]), forward(t, **k))[1])
    list(chat.say("The rope is " * 20))
    first = ran[0]
    ran.clear()
    list(chat.say("And?"))
    assert ran[0] < first / 2


def test_a_cache_that_is_too_short_is_made_anew(long_context, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(conversation, "FIRST_CACHE", 8)
    chat = Chat(long_context, tiny_tokenizer, max_new_tokens=12)
    for text in SAYINGS:
        list(chat.say(text))
    assert chat.messages == _plain(long_context, tiny_tokenizer, max_new_tokens=12)


def test_the_oldest_turns_are_dropped_but_not_the_system_message(long_context, tiny_tokenizer):
    import dataclasses

    long_context.config = dataclasses.replace(long_context.config, max_position_embeddings=150)
    chat = Chat(long_context, tiny_tokenizer, system="Be short.", max_new_tokens=10)
    notices = []
    for i in range(6):
        list(chat.say(f"message {i} " + "word " * 5))
        notices.append(chat.notice)
    assert notices[0] is None
    assert any(n and "dropped" in n for n in notices)
    assert chat.dropped > 0
    assert chat.messages[0] == {"role": "system", "content": "Be short."}
    assert chat.messages[1]["role"] == "user"
    assert chat.messages[-2]["content"].startswith("message 5")
    before = list(chat.messages)
    with pytest.raises(UserError, match="the message makes"):
        list(chat.say("word " * 200))
    assert chat.messages == before
    chat.reset()
    assert chat.messages == before[:1]


def test_an_answer_left_early_stays_as_far_as_it_got(long_context, tiny_tokenizer):
    chat = Chat(long_context, tiny_tokenizer, max_new_tokens=30)
    pieces = chat.say(SAYINGS[0])
    started = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": started}
    said = "".join(chat.say(SAYINGS[1]))
    (again,) = generate(long_context, tiny_tokenizer, [chat.messages[:-1]], max_new_tokens=30)
    assert said == again.text


def test_a_message_without_an_answer_is_forgotten(long_context, tiny_tokenizer):
    chat = Chat(long_context, tiny_tokenizer, max_new_tokens=5)
    first = "".join(chat.say(SAYINGS[0]))
    chat.stop = (*tuple(chr(i) for i in range(1, 256)), "�")
    assert "".join(chat.say(SAYINGS[1])) == ""
    assert "forgotten" in chat.notice
    assert [m["content"] for m in chat.messages] == [SAYINGS[0], first]
    chat.stop = ()
    assert "".join(chat.say(SAYINGS[2]))


def test_a_seed_gives_the_same_conversation_and_turns_differ(long_context, tiny_tokenizer):
    def talk(seed):
        chat = Chat(long_context, tiny_tokenizer, max_new_tokens=8, temperature=1.5, seed=seed)
        return ["".join(chat.say("The rope is")) for _ in range(3)]

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


def test_without_a_chat_template_there_is_no_chat(long_context, tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Chat(long_context, tiny_tokenizer)


def test_the_context_manager_of_inference_does_not_leak(long_context, tiny_tokenizer):
    chat = Chat(long_context, tiny_tokenizer, max_new_tokens=3)
    list(chat.say("x"))
    assert not torch.is_inference_mode_enabled()
