"""Fertility: what is counted of words and tokens, against counting them one by one."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.clean.step import Texts
from ropewalk.data import fertility as module
from ropewalk.data.fertility import fertility, table_rows, tokens_of_words
from ropewalk.data.readers import Source

ALPHABET = "ab é日🙂 \n.,1"


@given(
    st.lists(st.integers(0, 20), max_size=12),
    st.lists(st.integers(0, 20), min_size=2, max_size=8, unique=True),
)
@settings(max_examples=300, deadline=None)
def test_a_token_belongs_to_each_word_that_it_has_a_part_of(token_cuts, word_cuts):
    cuts = sorted({0, 21, *token_cuts})
    places = np.array(list(pairwise(cuts)))
    words = np.array(list(pairwise(sorted(word_cuts))))[::2]
    expected = [sum(a < end and b > start for a, b in places) for start, end in words]
    assert tokens_of_words(places, words[:, 0], words[:, 1]).tolist() == expected


@given(st.lists(st.text(ALPHABET, max_size=40), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_sums_equal_a_count_text_by_text(backend_tokenizer, texts):
    used = np.zeros(module._rows(backend_tokenizer), bool)
    for text, found in zip(texts, module._measure(backend_tokenizer, Texts(texts), used), strict=True):
        encoded = backend_tokenizer(text, return_offsets_mapping=True)
        words = Texts([text]).words.only
        pieces = [
            sum(a < end and b > start for a, b in encoded["offset_mapping"])
            for start, end in zip(words.starts, words.ends, strict=True)
        ]
        assert (found.tokens, found.words) == (len(encoded["input_ids"]), len(pieces))
        assert (found.word_tokens, found.split_words) == (sum(pieces), sum(n > 1 for n in pieces))
        assert found.bytes == len(text.encode())
        assert used[encoded["input_ids"]].all()


@pytest.fixture(scope="module")
def backend_tokenizer(backend):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="</s>")


def test_a_tokenizer_of_bytes_alone_has_known_figures(tmp_path, write, backend_tokenizer):
    """Every word of k letters takes k tokens and a space one: what such a tokenizer must measure."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = PreTrainedTokenizerFast(tokenizer_object=inner)
    source = Source(str(write("x.jsonl", json.dumps({"text": "a bcd ef"}) + "\n")), "x")
    bytewise, learned = fertility({"bytes": plain, "learned": backend_tokenizer}, [source])
    assert bytewise.whole.bytes_per_token == 1.0
    assert bytewise.whole.words == learned.whole.words == 3
    assert bytewise.unused == 256 - len(set("a bcd ef"))
    # a space is in no word, and a token of its own
    assert (bytewise.whole.tokens_per_word, bytewise.whole.split) == (2.0, 2 / 3)


def test_parts_are_by_source_and_language_and_sum_to_the_whole(monkeypatch, write, backend_tokenizer):
    class Language:
        attributes = {"language": "code"}  # noqa: RUF012

        def map(self, texts):
            return pa.table({"language": ["de" if "Zwölf" in text else "en" for text in texts.texts]})

    monkeypatch.setattr(module, "Language", Language)
    first = write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ("rope walk", "Zwölf Boxer")))
    second = write("b.jsonl", json.dumps({"text": "walk rope"}) + "\n")
    sources = [Source(str(first), "a"), Source(str(second), "b")]
    (found,) = fertility({"t": backend_tokenizer}, sources)
    assert sorted(found.parts) == [("a", "de"), ("a", "en"), ("b", "en")]
    assert found.whole.bytes == len("rope walkZwölf Boxerwalk rope".encode())
    header, rows = table_rows([found])
    assert [row[:2] for row in rows] == [["all", "all"], ["a", "de"], ["a", "en"], ["b", "en"]]
    assert all(len(row) == len(header) for row in rows)
