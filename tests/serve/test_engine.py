"""Answers are those of the plain model and of transformers, in whatever batch; and work is saved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import RopewalkError, UserError
from ropewalk.serve import Completion, engine, generate, stream

FAMILIES = ["llama", "mistral", "gemma3", "qwen3_moe", "gpt2"]
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(3, 384, (n,), generator=GENERATOR).tolist() for n in (11, 1, 23, 5, 17)]


def _uncached(model, prompt: list[int], steps: int, ends: frozenset[int]) -> list[int]:
    """Greedy decoding by running everything anew for each token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + steps and not (len(ids) > len(prompt) and ids[-1] in ends):
            ids.append(int(model.logits(model(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[len(prompt) :]


def _transformers(
    reference, prompts: list[list[int]], steps: int, ends: frozenset[int], **options
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = reference.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=0,
        **options,
    )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_uncached_model_and_transformers_token_for_token(family, models, tiny_tokenizer):
    reference, model = models(family)
    # Enough ids that end an answer for some rows to stop early; which is seen from a first run.
    free = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=20)
    ends = frozenset({2, free[0].tokens[6], free[2].tokens[9]})
    config = model.config
    try:
        model.config = _replace(config, eos_token_id=tuple(sorted(ends)))
        ours = [c.tokens for c in generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=20)]
    finally:
        model.config = config
    assert len({len(tokens) for tokens in ours}) > 1  # rows ended at different times
    assert ours == [_uncached(model, prompt, 20, ends) for prompt in PROMPTS]
    assert ours == _transformers(reference, PROMPTS, 20, ends)


def _replace(config, **changes):
    import dataclasses

    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 3}])
def test_an_answer_does_not_depend_on_its_batch(family, models, tiny_tokenizer, settings):
    _, model = models(family)
    prompts = [*PROMPTS, PROMPTS[0]]
    results = [
        generate(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=n, **settings)
        for n in (1, 2, 16)
    ]
    assert results[0] == results[1] == results[2]
    assert [r.prompt_tokens for r in results[0]] == [len(p) for p in prompts]
    if settings:
        assert results[0][0] != results[0][-1]  # the same prompt again is another draw
    else:
        assert results[0][0] == results[0][-1]


def test_a_prompt_draws_the_same_whatever_comes_after_it(models, tiny_tokenizer):
    _, model = models("llama")
    few = generate(model, tiny_tokenizer, PROMPTS[:2], max_new_tokens=8, temperature=1.0, seed=9)
    many = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=9)
    other = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=10)
    assert many[:2] == few
    assert other != many


def test_repetition_penalty_equals_that_of_transformers(models, tiny_tokenizer):
    reference, model = models("llama")
    for prompt in PROMPTS:
        (ours,) = generate(model, tiny_tokenizer, [prompt], max_new_tokens=16, repetition_penalty=1.4)
        assert (
            ours.tokens == _transformers(reference, [prompt], 16, frozenset({2}), repetition_penalty=1.4)[0]
        )


@pytest.fixture
def recorded(models, monkeypatch):
    """The llama, with the shapes that went through its body and its head."""
    _, model = models("llama")
    body, head = [], []
    forward, logits = model.forward, model.logits
    monkeypatch.setattr(
        model, "forward", lambda t, *a, **k: (body.append(tuple(t.shape)), forward(t, *a, **k))[1]
    )
    monkeypatch.setattr(model, "logits", lambda h: (head.append(h.shape[:-1].numel()), logits(h))[1])
    return model, body, head


def test_a_common_prefix_is_run_once_and_changes_nothing(recorded, tiny_tokenizer):
    model, body, _ = recorded
    prefix = PROMPTS[2] * 2
    prompts = [prefix + p for p in PROMPTS]
    together = generate(model, tiny_tokenizer, prompts, max_new_tokens=4, batch_size=2)
    assert body[0] == (1, len(prefix))
    assert max(length for _, length in body[1:]) <= 23
    alone = [generate(model, tiny_tokenizer, [p], max_new_tokens=4)[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_prompt_many_times_shares_all_but_its_last_token(family, models, tiny_tokenizer):
    _, model = models(family)
    prompt = PROMPTS[2]
    answers = generate(model, tiny_tokenizer, [prompt] * 6, max_new_tokens=6)
    assert answers == generate(model, tiny_tokenizer, [prompt], max_new_tokens=6) * 6


def test_rows_that_ended_are_not_run_any_more_and_only_the_last_position_meets_the_head(
    recorded, tiny_tokenizer
):
    model, body, head = recorded
    prompts = [[*PROMPTS[2][:20], i] for i in range(3, 9)]
    free = generate(model, tiny_tokenizer, prompts, max_new_tokens=10, batch_size=6)
    stop = [tiny_tokenizer.decode(free[0].tokens[4:6]), tiny_tokenizer.decode(free[1].tokens[2:4])]
    body.clear()
    head.clear()
    answers = generate(model, tiny_tokenizer, prompts, max_new_tokens=10, batch_size=6, stop=stop)
    lengths = [len(answer.tokens) for answer in answers]
    assert min(lengths) < 10
    steps = [rows for rows, length in body if length == 1][-max(lengths) + 1 :]
    assert steps == [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert max(head) == len(prompts)


@given(finished=st.lists(st.booleans(), max_size=12))
def test_rows_that_go_on_move_down_into_the_gaps_and_no_further(finished):
    keep = engine._keep(finished)
    assert sorted(keep) == [row for row, done in enumerate(finished) if not done]
    assert all(old >= new for new, old in enumerate(keep))
    gaps = sum(finished[: len(keep)])
    assert sum(old != new for new, old in enumerate(keep)) == gaps


def test_a_long_prompt_goes_through_in_parts(recorded, tiny_tokenizer, monkeypatch):
    model, body, _ = recorded
    whole = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    body.clear()
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 20)
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=5) == whole
    assert max(rows * length for rows, length in body) <= 20


def test_the_context_ends_an_answer_with_reason_length(models, tiny_tokenizer):
    for family in ("llama", "gpt2"):
        _, model = models(family)
        prompts = [(PROMPTS[2] * 5)[:n] for n in (90, 95, 40)]
        answers = generate(model, tiny_tokenizer, prompts, max_new_tokens=10, stop=["never"])
        assert [len(a.tokens) for a in answers] == [6, 1, 10]
        assert {a.finish_reason for a in answers} == {"length"}
        with pytest.raises(UserError, match="prompt 2 has 96 tokens"):
            generate(model, tiny_tokenizer, [PROMPTS[0], [5] * 96])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5], []], {}, "prompt 2 is empty"),
        ([[5], [384]], {}, "prompt 2 has a token id outside 0..383"),
        ([[-1]], {}, "outside"),
        ("text", {}, "list of prompts"),
        ([[5], {"role": "user", "content": "a"}], {}, "prompt 2 is one message; give a list of messages"),
        ([[5], None], {}, "prompt 2 is neither text nor a list of messages or of token ids"),
        ([["a"]], {}, "prompt 1 is neither text nor"),
        ([[5.5]], {}, "prompt 1 is neither text nor"),
        ([[5]], {"stop": "x"}, "list of strings"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[5]], {"batch_size": 0}, "batch_size"),
        ([[5]], {"temperature": -1}, "temperature"),
        ([[5]], {"temperature": 1, "seed": 2**64}, "seed is 18446744073709551616"),
        (["a", "b\udcff"], {}, "prompt 2 is not valid Unicode at character 1"),
    ],
)
def test_wrong_input_is_refused_by_name(models, tiny_tokenizer, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(models("llama")[1], tiny_tokenizer, prompts, **options)


def test_an_answer_of_any_length_may_be_asked_for(models, tiny_tokenizer):
    model = models("llama")[1]
    (answer,) = generate(model, tiny_tokenizer, ["a"], temperature=1.0, max_new_tokens=10**12)
    assert answer.prompt_tokens + len(answer.tokens) <= model.context_length


def test_no_prompts_give_no_answers(models, tiny_tokenizer):
    assert generate(models("llama")[1], tiny_tokenizer, []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_are_said(models, tiny_tokenizer, temperature):
    _, model = models("llama")
    weight = model.blocks[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data[3, 3] = float("nan")
        with pytest.raises(RopewalkError, match="not finite"):
            generate(model, tiny_tokenizer, PROMPTS, temperature=temperature)
    finally:
        weight.data.copy_(kept)


def test_the_model_can_be_trained_after_and_keeps_its_mode(family_dirs, tiny_tokenizer):
    """Nothing made in inference mode stays in the model, also when a stream is left early."""
    from ropewalk.model import load_model

    for family in FAMILIES:
        model = load_model(family_dirs[family]).train()
        pieces = stream(model, tiny_tokenizer, "The ropewalk", temperature=1.0, top_k=200)
        next(pieces)
        pieces.close()
        assert model.training
        model.logits(model(torch.tensor([PROMPTS[0]]))).sum().backward()
        assert model.embed.weight.grad.isfinite().all()


def _text_of(model, tokenizer, **options) -> Completion:
    return generate(model, tokenizer, ["The rope"], max_new_tokens=24, temperature=1.0, seed=4, **options)[0]


def test_a_stop_string_cuts_exactly_also_across_tokens_and_streams_the_same(models, tiny_tokenizer):
    _, model = models("llama")
    free = _text_of(model, tiny_tokenizer)
    assert free.finish_reason == "length"
    for start in range(2, len(free.text) - 3):
        stop = [free.text[start : start + 3]]
        expected = free.text[: free.text.index(stop[0])]
        answer = _text_of(model, tiny_tokenizer, stop=stop)
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        pieces = stream(
            model, tiny_tokenizer, "The rope", max_new_tokens=24, temperature=1.0, seed=4, stop=stop
        )
        assert "".join(pieces) == expected


def test_callbacks_tell_every_piece_and_end_once(models, tiny_tokenizer):
    _, model = models("llama")
    told = {i: "" for i in range(len(PROMPTS))}
    ended = []

    def on_token(index: int, piece: str, last: bool) -> None:
        assert index not in ended
        told[index] += piece
        if last:
            ended.append(index)

    answers = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, batch_size=2, on_token=on_token)
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert [told[i] for i in range(len(PROMPTS))] == [answer.text for answer in answers]


def test_what_ends_an_answer(models, tiny_tokenizer):
    """The model's and the tokenizer's end of sequence, the template's end of turn, a special stop string."""
    _, model = models("llama")
    tiny_tokenizer.eos_token = "<|endoftext|>"
    config = model.config
    try:
        model.config = _replace(config, eos_token_id=(77, 78))
        assert engine.end_tokens(model, tiny_tokenizer) == {77, 78, 0, 2}
        tiny_tokenizer.chat_template = None
        assert engine.end_tokens(model, tiny_tokenizer) == {77, 78, 0}
        assert engine.end_tokens(model, tiny_tokenizer, ["<|im_end|>", "x"]) == {77, 78, 0, 2}
        tiny_tokenizer.chat_template = "{{ raise_exception('no') }}"
        assert engine.end_tokens(model, tiny_tokenizer) == {77, 78, 0}
    finally:
        model.config = config


def test_text_and_conversations_are_prompts(models, tiny_tokenizer):
    _, model = models("llama")
    ids = tiny_tokenizer("The rope")["input_ids"]
    text, same = generate(model, tiny_tokenizer, ["The rope", ids], max_new_tokens=5)
    assert text == same
    turns = [{"role": "user", "content": "The rope"}]
    rendered = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    asked, same = generate(model, tiny_tokenizer, [turns, rendered], max_new_tokens=5)
    assert asked == same
