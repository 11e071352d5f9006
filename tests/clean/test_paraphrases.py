"""Paraphrases of real questions are found by vectors where n-grams find few of them; other texts are not."""

import importlib.util
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from ropewalk.clean.contamination import Contamination, EvaluationItem, Paraphrases
from ropewalk.clean.contamination.paraphrase import passages
from ropewalk.clean.step import Texts
from ropewalk.clean.vectors import CharacterNgrams, ModelVectors

MATERIAL = Path(__file__).resolve().parents[2] / "bench" / "contamination_text.py"
spec = importlib.util.spec_from_file_location("contamination_text", MATERIAL)
material = importlib.util.module_from_spec(spec)
spec.loader.exec_module(material)


@pytest.fixture(scope="module")
def questions(shared):
    items = material.gsm8k(shared)[:400]
    vectors = CharacterNgrams([item.question for item in items])
    return items, Paraphrases(items, vectors, "letters")


@pytest.mark.parametrize("way", ["synonyms", "other numbers", "other order"])
def test_light_paraphrases_are_found(questions, shared, way):
    items, step = questions
    rng = random.Random(4)
    documents = material.unrelated(shared)
    chosen = rng.sample(items, 60)
    texts = []
    for item in chosen:
        document = rng.choice(documents)
        texts.append(
            f"{document[:900]}\n{material.PARAPHRASES[way](item.question, rng)}\n{document[900:1800]}"
        )
    rows = step.map(Texts(texts))["paraphrase_of"].to_pylist()
    hits = [
        any(
            one["item"] == item.id and one["start"] < 900 + len(item.question) and one["end"] > 900
            for one in row
        )
        for item, row in zip(chosen, rows, strict=True)
    ]
    assert np.mean(hits) >= 0.95
    exact = Contamination(items).map(Texts(texts))["contaminated"].to_pylist()
    assert np.mean(exact) < 0.6  # else the words need no other look


def test_unrelated_texts_are_not_found(questions, shared):
    _, step = questions
    documents = random.Random(5).sample(material.unrelated(shared), 150)
    assert step.map(Texts(documents))["paraphrase"].to_numpy().max() < step.similar


def test_vectors_have_length_1_and_do_not_see_order_or_punctuation():
    vectors = CharacterNgrams(["What does the heron eat?", "Where do herons sleep?"])
    a, b, nothing = vectors(["What does the heron eat?", "the heron, eat! what DOES...", "?"])
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-6)
    assert a @ b > 0.7
    assert not nothing.any()
    assert vectors([]).shape == (0, vectors.dimensions)


def test_passages_are_whole_sentences_of_about_the_wanted_words():
    text = "One two three. Four five! Six seven eight nine ten eleven?\n\nTwelve"
    assert [text[a:b].split() for a, b in passages(text, 5)] == [
        "One two three. Four five!".split(),
        "Four five!".split(),
        "Six seven eight nine ten eleven?".split(),
        ["Twelve"],
    ]
    assert list(passages("", 5)) == list(passages(" \n ", 5)) == []


def test_a_users_model_gives_vectors_that_do_not_depend_on_their_neighbours(tiny_llama_dir):
    vectors = pickle.loads(pickle.dumps(ModelVectors(str(tiny_llama_dir))))  # as other processes get it
    texts = ["a rope", "The ropewalk is a long straight building in which loose fibre becomes rope.", ""]
    together = vectors(texts)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert (together == np.concatenate([vectors([text]) for text in texts])).all()
    item = EvaluationItem("s", "0", texts[1])
    row = Paraphrases([item], vectors, "tiny", similar=0.99).map(Texts([f"{texts[1]}", "a"]))
    assert [len(found) for found in row["paraphrase_of"].to_pylist()] == [1, 0]
