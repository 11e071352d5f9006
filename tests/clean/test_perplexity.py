"""Perplexity is the model's own loss on a text's first tokens, whatever else is in the batch."""

import math
import pickle
import shutil

import pytest

from ropewalk.clean.perplexity import Perplexity
from ropewalk.clean.step import Texts
from ropewalk.errors import UserError

TEXTS = [
    "The ropewalk is a long straight building.",
    "",
    "a",
    "zz qq xx ü€",
    "strand " * 60,
    "bad \ud800 one",
]


@pytest.fixture(scope="module")
def step(tiny_llama_dir):
    return Perplexity(tiny_llama_dir, tokens=24)


def test_it_is_the_loss_that_transformers_computes(step, tiny_llama_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    for text, row in zip(TEXTS, step.map(Texts(TEXTS)).to_pylist(), strict=True):
        if len(text) < 2 or "\ud800" in text:
            continue
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :24]
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        scored = len(tokenizer.decode(ids[0]).encode()) - len(tokenizer.decode(ids[0, :1]).encode())
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(
            loss * (ids.shape[1] - 1) / math.log(2) / scored, rel=1e-4
        )


def test_too_short_texts_have_none_and_neighbours_do_not_matter(step):
    together = step.map(Texts(TEXTS)).to_pylist()
    assert together[1] == together[2] == {"perplexity": None, "bits_per_byte": None}
    assert together == [step.map(Texts([text])).to_pylist()[0] for text in TEXTS]
    assert together[::-1] == step.map(Texts(TEXTS[::-1])).to_pylist()
    assert step.map(Texts([])).num_rows == 0


def test_settings_name_the_model_by_its_content_and_the_step_can_go_to_another_process(
    step, tiny_llama_dir, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    assert Perplexity(other, tokens=24).settings() == step.settings()
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert Perplexity(other, tokens=24).settings() != step.settings()
    step.map(Texts(["warm"]))
    copy = pickle.loads(pickle.dumps(step))
    assert "_loaded" not in vars(copy)
    assert copy.map(Texts(TEXTS)) == step.map(Texts(TEXTS))


def test_no_more_is_looked_at_than_the_model_has_room_for(tiny_llama_dir):
    texts = Texts(["a rope is made of strands " * 200])
    assert Perplexity(tiny_llama_dir, tokens=300).map(texts) == Perplexity(tiny_llama_dir, tokens=256).map(
        texts
    )
    with pytest.raises(UserError, match="2 tokens"):
        Perplexity(tiny_llama_dir, tokens=1)
