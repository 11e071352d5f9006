"""Learned tokenizers: exact, the same from the same texts, and readable by everybody."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.readers import Source
from ropewalk.data.train_tokenizer import SPECIAL, train_tokenizer
from ropewalk.errors import UserError
from ropewalk.model import load_tokenizer

WORDS = "rope walk fibre strand twist Zwölf Boxkämpfer 日本語 नमस्ते 1234567 don't tar; def add(a,b):".split()


def texts(count=200, seed=0):
    chance = random.Random(seed)
    return [" ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 60))) for _ in range(count)]


def rows(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "texts.jsonl").write_text(rows(texts()))
    return train_tokenizer([Source(str(folder / "texts.jsonl"), "texts")], 330, folder / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(learned):
    return load_tokenizer(learned.directory)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back_exactly(tokenizer, text):
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate is in no UTF-8 text
        return
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_of_utf_8_has_a_token(tokenizer):
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0x10000, 0x110000, 9973)]))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_order_of_texts_and_how_they_are_split_over_files_change_nothing(tmp_path, learned):
    shuffled = texts()
    random.Random(1).shuffle(shuffled)
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(rows(shuffled[i::3]))
    other = train_tokenizer([Source(str(tmp_path / "*.jsonl"), "x")], 330, tmp_path / "tokenizer")
    first, second = (one.directory / "tokenizer.json" for one in (learned, other))
    assert first.read_bytes() == second.read_bytes()


def test_transformers_opens_it_as_it_is(learned, tokenizer):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(learned.directory, local_files_only=True)
    for text in texts(20, seed=5):
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(other) == learned.vocab_size == 330
    assert (other.eos_token, other.pad_token) == ("<|endoftext|>", "<|padding|>")
    assert [other.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3]


def test_merges_are_those_of_the_most_frequent_pairs(tmp_path):
    """Against BPE as it is defined, on words that the split leaves whole."""
    words = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    (tmp_path / "x.jsonl").write_text(rows(words))
    made = train_tokenizer([Source(str(tmp_path / "x.jsonl"), "x")], 260 + 3, tmp_path / "out")
    merges = json.loads((made.directory / "tokenizer.json").read_text())["model"]["merges"]
    pieces = [list(word) for word in words]
    expected = []
    for _ in range(3):
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: counts[pair])
        assert sorted(counts.values())[-2] < counts[best], "no tie, so that the definition says which"
        expected.append(list(best))
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = ["".join(best)]
    assert merges == expected


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_no_token_has_more_digits_than_asked(tmp_path, write, digits):
    path = write("x.txt", "1234567890 " * 50)
    made = train_tokenizer([Source(str(path), "x")], 300, tmp_path / "out", digits=digits)
    lengths = {len(token) for token in load_tokenizer(made.directory).get_vocab() if token.isdigit()}
    assert max(lengths) == digits


def test_special_tokens_are_whole_and_the_chat_template_renders(tmp_path, write):
    template = write("chat.jinja", "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
    path = write("x.txt", "turn about turn " * 20)
    made = train_tokenizer(
        [Source(str(path), "x")], 280, tmp_path / "out", special=["<|turn|>"], chat_template=template
    )
    tokenizer = load_tokenizer(made.directory)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "turn"}])["input_ids"]
    assert ids[0] == 4
    assert tokenizer.decode(ids) == "<|turn|>turn"


def test_a_vocabulary_that_the_texts_cannot_fill_is_said(tmp_path, write):
    made = train_tokenizer([Source(str(write("x.txt", "ab ab")), "x")], 1000, tmp_path / "out")
    assert made.vocab_size < 270
    assert "1,000 tokens were asked for" in made.note


def test_mistakes_are_said_before_anything_is_written(tmp_path, write):
    good = [Source(str(write("x.txt", "some text")), "x")]
    with pytest.raises(UserError, match="no room to learn"):
        train_tokenizer(good, 260, tmp_path / "out")
    with pytest.raises(UserError, match="vocab size: 1,000,000,000,000 is more than 4,194,304"):
        train_tokenizer(good, 10**12, tmp_path / "out")
    with pytest.raises(UserError, match=r"x\.txt: is a file, and a folder is to be made there"):
        train_tokenizer(good, 300, good[0].path, overwrite=True)
    with pytest.raises(UserError, match="no text in it"):
        train_tokenizer([Source(str(write("empty.txt", "")), "empty")], 300, tmp_path / "out")
    bad = write("bad.jsonl", '{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        train_tokenizer([Source(str(bad), "bad")], 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train_tokenizer(good, 300, tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        train_tokenizer(good, 300, tmp_path / "out")
    train_tokenizer(good, 300, tmp_path / "out", overwrite=True)


def test_a_recipe_from_scratch_takes_it(tmp_path, learned, tokenizer, write):
    from ropewalk.data import prepare

    path = write("train.jsonl", rows(texts(50, seed=9)))
    prepared = prepare(
        {
            "name": "x",
            "model": {
                "config": {"model_type": "llama", "vocab_size": 384},
                "tokenizer": str(learned.directory),
            },
            "data": {
                "train": [{"path": str(path)}],
                "sequence_length": 1024,
                "validation_fraction": 0.0,
                "directory": str(tmp_path),
                "workers": 1,
            },
            "train": {"steps": 1},
        }
    )
    trained = [prepared.train.document(i).tokens.tolist() for i in range(len(prepared.train))]
    assert [tokenizer.decode(ids) for ids in trained] == [t + "<|endoftext|>" for t in texts(50, seed=9)]
