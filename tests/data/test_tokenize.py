"""Plain text, pairs and pieces: which tokens there are and which are scored."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.data.records import BadRow, Record
from ropewalk.data.tokenize import Tokenization, Tokens, split
from ropewalk.errors import UserError


def text(content, where="f:1"):
    return Record("id", "s", where, text=content)


def pair(prompt, completion):
    return Record("id", "s", "f:1", prompt=prompt, completion=completion)


@pytest.fixture
def with_bos(backend):
    """A tokenizer that begins every text with <bos>."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(backend)
    inner.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    inner.enable_truncation(2)  # as some tokenizer files ask for; must not be obeyed
    inner.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="</s>")


def test_text_is_scored_whole_and_ends_with_eos(tokenizers):
    tokenizer = tokenizers["none"]
    (result,) = Tokenization(tokenizer)([text("Hello, rope walk")])
    assert result.ids.tolist() == [*tokenizer("Hello, rope walk")["input_ids"], tokenizer.eos_token_id]
    assert result.scored.tolist() == [False] + [True] * (len(result.ids) - 1)
    (bare,) = Tokenization(tokenizer, append_eos=False)([text("Hello, rope walk")])
    assert bare.ids.tolist() == result.ids.tolist()[:-1]


def test_bos_and_eos_come_once_even_if_the_text_has_them(with_bos):
    bos, eos = with_bos.bos_token_id, with_bos.eos_token_id
    plain, written = Tokenization(with_bos)([text("Hello rope"), text("<bos>Hello rope</s>")])
    assert plain.ids.tolist() == written.ids.tolist()
    assert plain.ids.tolist().count(bos) == plain.ids.tolist().count(eos) == 1
    assert len(plain.ids) > 4, "the tokenizer file's own truncation is not obeyed"


def test_a_pair_without_template_scores_the_completion_and_eos(tokenizers, with_bos):
    for tokenizer in (tokenizers["none"], with_bos):
        (result,) = Tokenization(tokenizer)([pair("Question: 1?\n", "    return 1")])
        inner = tokenizer.backend_tokenizer
        inner.no_truncation()
        inner.no_padding()
        prompt = [
            *Tokenization(tokenizer).begin,
            *inner.encode("Question: 1?\n", add_special_tokens=False).ids,
        ]
        assert result.ids[: len(prompt)].tolist() == prompt
        assert result.scored.tolist() == [False] * len(prompt) + [True] * (len(result.ids) - len(prompt))
        assert result.ids[-1] == tokenizer.eos_token_id


def test_a_pair_with_template_is_a_conversation(tokenizers):
    tokenization = Tokenization(tokenizers["chatml"])
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    one, other = tokenization([pair("a", "b"), Record("id", "s", "f:1", messages=messages)])
    assert one.ids.tolist() == other.ids.tolist()
    assert one.scored.tolist() == other.scored.tolist()


def test_results_keep_the_order_of_mixed_records_and_do_not_depend_on_the_batch(tokenizers):
    tokenization = Tokenization(tokenizers["mistral"])
    bad = Record("id", "s", "f:3", messages=({"role": "assistant", "content": "x"},))
    records = [text("one"), pair("two", "three"), bad, text("four five"), pair("6", "7"), text("8")]
    together = tokenization(records)
    assert isinstance(together[2], BadRow)
    assert together[2].where == "f:3"
    for record, result in zip(records, together, strict=True):
        (alone,) = tokenization([record])
        assert str(alone) == str(result)


@pytest.mark.parametrize("settings", [{}, {"score": "all", "append_eos": False}])
def test_another_process_gets_the_same_tokens(tokenizers, settings):
    made = Tokenization(next(iter(t for t in tokenizers.values() if t.chat_template)), **settings)
    records = [text("Hello, rope walk"), pair("Question: 1?", "1")]
    here, there = made(records), pickle.loads(pickle.dumps(made))(records)
    for one, other in zip(here, there, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scored.tolist() == other.scored.tolist()


def test_turns_that_nothing_ends_are_counted(tokenizers):
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}) * 2
    record = Record("id", "s", "f:1", messages=messages)
    assert Tokenization(tokenizers["plain"])([record])[0].turns_without_end == 2
    assert Tokenization(tokenizers["chatml"])([record])[0].turns_without_end == 0
    assert Tokenization(tokenizers["none"])([pair("a", "b")])[0].turns_without_end == 0


def test_the_assistant_alone_is_not_scored_in_plain_text(tokenizers):
    (row,) = Tokenization(tokenizers["chatml"], score="assistant")([text("a")])
    assert "data.score=assistant" in row.reason


def test_a_tokenizer_without_eos_is_refused_where_it_is_needed(backend):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend))
    with pytest.raises(UserError, match=r"data\.append_eos=false"):
        Tokenization(tokenizer)
    assert Tokenization(tokenizer, append_eos=False).end == []


@given(st.integers(2, 60), st.integers(3, 9), st.booleans())
def test_pieces_hold_every_token_in_order(total, limit, begins):
    begin = [99] if begins else []
    body = np.arange(total, dtype=np.uint32)
    ids = np.concatenate([np.array(begin, dtype=np.uint32), body])
    pieces = split(Tokens(ids, np.arange(len(ids)) > 0), limit, begin)
    assert np.concatenate([piece.ids[len(begin) :] for piece in pieces]).tolist() == body.tolist()
    for piece in pieces:
        assert 2 <= len(piece.ids) <= limit
        assert piece.ids[: len(begin)].tolist() == begin
        assert piece.scored.tolist() == [False] + [True] * (len(piece.ids) - 1)


@pytest.mark.parametrize("begin", ["", "<bos>"])
def test_places_that_are_not_scored_are_found_with_and_without_a_bos_of_the_text(with_bos, begin):
    content = f"{begin}Hello rope walk"
    place = (content.index("rope"), content.index("rope") + 4)
    (result,) = Tokenization(with_bos)([text(content)], [[place]])
    unscored = result.ids[1:][~result.scored[1:]].tolist()
    assert with_bos.decode(unscored).strip() == "rope"
    assert result.ids.tolist() == Tokenization(with_bos)([text("Hello rope walk")])[0].ids.tolist()
