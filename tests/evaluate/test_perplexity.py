"""Each token is foretold once from the context the stride promises; figures equal plain forward passes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import RopewalkError, UserError
from ropewalk.evaluate import perplexity
from ropewalk.evaluate.perplexity import encode, score_documents, windows
from ropewalk.model import load_model

TEXTS = [
    "The ropewalk is a long straight building.",
    "x",
    "Zwölf Boxkämpfer jagen Viktor. " * 3,
    "",
    "def f(): pass\n",
]


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path):
    return load_model(tiny_llama_dir)


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_the_promised_context(length, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, end, first in windows(length, window, stride):
        assert 1 <= end - begin <= window
        assert first - begin >= (window - stride if begin else 1)
        scored += range(first, end + 1)
    assert scored == list(range(1, length))


def _loss(model, ids: list[int], target: int) -> float:
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids]))[:, -1])
    return -float(logits.double().log_softmax(-1)[0, target])


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 8), (5, 1), (1, 1)])
def test_equals_brute_force_token_by_token(model, window, stride):
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 384, (n,), generator=generator).tolist() for n in (23, 2, 1, 0, 9, 40)]
    expected = []
    for ids in documents:
        total = 0.0
        for i in range(1, len(ids)):
            begin = max(0, math.ceil((i - window) / stride)) * stride
            assert i <= window or i - begin >= window - stride
            total += _loss(model, ids[begin:i], ids[i])
        expected.append(total)
    assert score_documents(model, documents, window, stride) == pytest.approx(expected, rel=1e-5)


def test_a_window_that_holds_the_document_is_one_plain_forward(model, tiny_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    result = perplexity(model, tiny_tokenizer, path, window=256, stride=128)
    assert result.documents == len(TEXTS)
    assert [name for name, _ in result.per_document] == [f"{path}:{i}" for i in range(1, 6)]
    for text, (_, score) in zip(TEXTS, result.per_document, strict=True):
        ids = tiny_tokenizer(text)["input_ids"]
        expected = 0.0
        if len(ids) > 1:
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([ids])))[0, :-1]
            expected = float(
                torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            )
        assert score.nll == pytest.approx(expected, rel=1e-5)
        assert score.tokens == max(len(ids) - 1, 0)
        assert score.bytes == len(text.encode()) - len(tiny_tokenizer.decode(ids[:1]).encode())
    nll, tokens, size = (
        sum(getattr(score, key) for _, score in result.per_document) for key in ("nll", "tokens", "bytes")
    )
    assert result.perplexity == pytest.approx(math.exp(nll / tokens))
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / size)
    assert json.loads(json.dumps(result.as_dict()))["documents"] == 5


def test_batches_change_nothing(model, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 384, (n,), generator=generator).tolist() for n in (30, 3, 17, 64, 5)]
    together = score_documents(model, documents, 16, 4)
    monkeypatch.setattr(sys.modules[score_documents.__module__], "BATCH_TOKENS", {"cpu": 1})
    assert score_documents(model, documents, 16, 4) == pytest.approx(together, rel=1e-5)


def test_special_tokens_around_the_text_are_context_but_not_scored_text(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain, size = encode(tiny_tokenizer, "héllo")
    assert size == len("héllo".encode()) - 1
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert encode(tiny_tokenizer, "héllo") == ([1, *plain], len("héllo".encode()))


def test_progress_and_mode(model, tiny_tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("The ropewalk is long. " * 40)
    told = []
    model.train()
    result = perplexity(model, tiny_tokenizer, path, 32, 16, lambda done, of: told.append((done, of)))
    assert model.training
    model.eval()
    assert result.documents == 1
    assert told[-1][0] == told[-1][1] > 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00binary", "a.txt"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n', r"a.jsonl:1: perplexity needs text"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1"),
        ("a.txt", b"", "no text of two tokens"),
    ],
)
def test_a_bad_file_is_named(model, tiny_tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        perplexity(model, tiny_tokenizer, path, 8, 4)


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, 9), (257, 4)])
def test_a_window_that_cannot_be_is_refused(model, window, stride):
    with pytest.raises(UserError, match=r"stride is|window is 257 tokens; the model has room for 256"):
        score_documents(model, [[1, 2, 3]], window, stride)


def test_nan_is_an_error_that_names_the_document(tiny_llama_dir, tiny_tokenizer, tmp_path):
    model = load_model(tiny_llama_dir)
    model.norm.weight.data[0] = float("nan")
    path = tmp_path / "a.txt"
    path.write_text("The ropewalk")
    with pytest.raises(RopewalkError, match=r"a\.txt: the model's loss is nan"):
        perplexity(model, tiny_tokenizer, path, 8, 4)
