"""Pieces of text: whole characters, exact cuts, nothing taken back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.serve.text import Detokenizer, StopStrings

UNICODE = [
    "naïve café",
    "日本語のテキスト",
    "👩\u200d👩\u200d👧\u200d👦 and 🇩🇪",
    "a\u0301\u0323 e\u0308",
    "def f():\n\treturn '€'\n",
    "\x00\x7f\u2028",
]


@pytest.mark.parametrize("text", UNICODE)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(max_size=60), cut=st.integers(0, 40))
def test_a_continuation_completes_its_prompt(tiny_tokenizer_dir, text, cut):
    """Also where the prompt ends within a character: prompt text and pieces together are the whole."""
    ids = _tokenizer(tiny_tokenizer_dir).encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(_tokenizer(tiny_tokenizer_dir), ids[:cut])
    answer = "".join(detokenizer.push(i) for i in ids[cut:]) + detokenizer.flush()
    prompt = _tokenizer(tiny_tokenizer_dir).decode(ids[:cut]).rstrip("\ufffd")
    assert prompt + answer == text or cut > len(ids)


@given(noise=st.lists(st.integers(3, 383), max_size=40))
def test_any_tokens_give_the_text_of_the_tokenizer(tiny_tokenizer_dir, noise):
    """Bytes that are no character included: nothing is lost, nothing is said twice."""
    tokenizer = _tokenizer(tiny_tokenizer_dir)
    noise = [i for i in noise if i < len(tokenizer)]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(i) for i in noise) + detokenizer.flush()
    assert text == tokenizer.decode(noise)


def test_special_tokens_give_no_text(tiny_tokenizer):
    detokenizer = Detokenizer(tiny_tokenizer)
    ids = tiny_tokenizer.encode("one<|im_end|> two<|endoftext|>", add_special_tokens=False)
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.flush() == "one two"


def test_sentencepiece_spaces_are_kept():
    """A decoder that strips the first space of a text must not strip it from a continuation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁one", "▁two", "▁", "x", *(f"<0x{b:02X}>" for b in "€".encode())]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="x"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    detokenizer = Detokenizer(tokenizer, [0])
    answer = [1, 2, 3, 4, 5, 6, 4, 5, 6, 0]
    assert [detokenizer.push(i) for i in answer] == [" two", " ", "x", "", "", "€", "", "", "€", " one"]


def _by_character(text: str, stop: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, cut before the longest stop string that ends here."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if s and text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text("ab\n", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_the_cut_is_exact_however_the_text_arrives(text, stop, cuts):
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    expected, stopped = _by_character(text, stop)
    strings, shown = StopStrings(stop), ""
    for start, end in pairwise(bounds):
        shown += strings.push(text[start:end])
        assert expected.startswith(shown)  # nothing is shown that is cut later
    shown += strings.flush()
    assert (shown, strings.stopped) == (expected, stopped)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back():
    strings = StopStrings(["\n\n", "User:"])
    assert strings.push("Hello") == "Hello"
    assert strings.push(" Us") == " "
    assert strings.push("a\n") == "Usa"
    assert strings.flush() == "\n"


_loaded = {}


def _tokenizer(path):
    from transformers import PreTrainedTokenizerFast

    if path not in _loaded:
        _loaded[path] = PreTrainedTokenizerFast.from_pretrained(path)
    return _loaded[path]
