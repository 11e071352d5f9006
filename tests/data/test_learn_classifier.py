"""A classifier from two sources: the words that it goes by are the words that tell the sources apart."""

import json
import random

import pytest

from ropewalk.clean.classifier import Classifier
from ropewalk.clean.step import Texts
from ropewalk.cli import main
from ropewalk.data.learn_classifier import learn_classifier, telling
from ropewalk.data.readers import Source
from ropewalk.errors import UserError

COMMON = "the a of and to in is it that was for on with as his they be at one have".split()


@pytest.fixture
def sources(write):
    """Both have the same common words; each has three of its own, in every third text or so."""
    chance = random.Random(0)

    def rows(own):
        texts = [chance.choices([*COMMON, *own], k=30) for _ in range(150)]
        return "".join(json.dumps({"text": " ".join(words)}) + "\n" for words in texts)

    good = write("good.jsonl", rows(["Theorem", "proof", "lemma"]))
    other = write("other.jsonl", rows(["casino", "BONUS", "click"]))
    return Source(str(good), "good"), Source(str(other), "other")


def test_the_words_that_tell_the_sources_apart_come_first(sources, tmp_path):
    found = learn_classifier(*sources, tmp_path / "out", words=3)
    assert {word for word, _ in found.good} == {"theorem", "proof", "lemma"}
    assert {word for word, _ in found.other} == {"casino", "bonus", "click"}
    assert found.report["auc"] > 0.95
    assert found.texts == (150, 150)
    loaded = Classifier.load(tmp_path / "out")
    for word, probability in [*found.good, *found.other]:
        assert loaded.probabilities(Texts([word]).words)[0] == pytest.approx(probability)


def test_words_in_few_texts_tell_nothing(sources, tmp_path):
    learn_classifier(*sources, tmp_path / "out")
    loaded = Classifier.load(tmp_path / "out")
    ranked = telling(loaded, ["rare casino " + "casino " * i for i in range(4)] + ["Casino theorem"] * 6)
    assert sorted(word for word, _ in ranked) == ["casino", "theorem"], "rare is in four texts"


def test_the_command_prints_the_figures_and_overwrites_nothing(sources, tmp_path, capsys):
    words = ["data", "classifier", sources[0].path, sources[1].path, "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "accuracy 0." in out or "accuracy 1." in out
    assert "auc " in out
    assert "most telling of good: " in out
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == [150, 150]


def test_too_few_texts_are_refused_and_nothing_is_written(write, sources, tmp_path):
    few = Source(str(write("few.txt", "one text")), "few")
    with pytest.raises(UserError, match="of each kind"):
        learn_classifier(few, sources[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
